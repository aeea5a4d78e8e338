"""Recipes on two gloo ranks with a tiny pipeline: the ranks decide and draw alike, and as one rank would."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.processes import ROOT, host_environment, run

RECIPES = ("hybrid_tp", "parallel_uaa", "parallel_extra", "ring", "parallel_async")
STEPS = 16


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[tuple[str, str], dict]:
    out = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu/recipes.py", "--device", "cpu", "--gpus", "2", "--size", "tiny", "--side", "64",
         "--steps", str(STEPS), "--only", ",".join([*RECIPES, "parallel_fp8"]), "--out", str(out)],
        cwd=ROOT, env=host_environment(), capture_output=True, text=True, timeout=900, errors="replace",
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return {(row["recipe"], row["run"]): row for row in map(json.loads, out.read_text().splitlines())}


@pytest.mark.parametrize("recipe", RECIPES)
def test_ranks_agree(rows, recipe):
    uncached, cached = rows[recipe, "uncached"], rows[recipe, "cached"]
    for row in (uncached, cached):
        assert row["equal_pictures"] and row["equal_decisions"]
        assert row["computed"] + row["cached"] == STEPS
    assert cached["cached"] > 0


@pytest.mark.parametrize("recipe", ["hybrid_tp", "ring", "parallel_async"])
def test_two_ranks_draw_what_one_would(rows, recipe):
    """Without VAE tiles or other sizes, only rounding differs; the steps that are cached do not."""
    alone = rows["one GPU, nothing split", "cached"]
    for run in ("uncached", "cached"):
        assert rows[recipe, run]["off_single"] < 1e-3
    assert rows[recipe, "cached"]["cached"] == alone["cached"]
    assert rows[recipe, "cached"]["diffs"] == pytest.approx(alone["diffs"], rel=0.02)


def test_what_needs_a_gpu_is_said(rows):
    assert "needs CUDA devices, this machine has cpu" in rows["parallel_fp8", "not run"]["why"]
