"""Recipes on two gloo ranks with a tiny pipeline: the ranks decide and draw alike, and as one rank would."""

from __future__ import annotations

import functools
import json

import pytest

from tests.e2e.conftest import free_ports, run_together
from tests.processes import host_environment, run

RECIPES = ("hybrid_tp", "parallel_uaa", "parallel_extra", "ring", "parallel_async")
STEPS = 16


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[tuple[str, str], dict]:
    out = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    arguments = [
        "-m", "benchmarks.gpu.recipes", "--device", "cpu", "--gpus", "2", "--size", "tiny", "--side", "64",
        "--steps", STEPS, "--only", ",".join([*RECIPES, "parallel_fp8"]), "--out", out,
    ]
    (port,) = free_ports(1)
    # What torchrun would give its processes.
    environments = [
        host_environment(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port), RECIPES_RANK="1", RECIPES_DEVICE="cpu",
        )
        for rank in range(2)
    ]
    done, other = run_together(*(
        functools.partial(run, arguments, env=environment, timeout=600) for environment in environments
    ))
    assert other.returncode == 0, other.stdout[-2000:] + other.stderr[-3000:]
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
