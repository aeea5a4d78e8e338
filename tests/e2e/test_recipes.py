"""Recipes of configs/ through the real command line: pictures, reports, equal ranks, or one line why not."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.conftest import PORTS, run_together
from tests.processes import ROOT, host_environment, run

EAGER = {"residual_diff_threshold": 0.9, "max_warmup_steps": 2, "verify_ranks": True}
"""On top of each recipe's cache: random weights change more from step to step than trained ones."""

CACHED = ("cache_taylorseer", "hybrid", "hybrid_tp")
GOOD = {"attention_native": 1, "cache_taylorseer": 1, "hybrid": 2, "hybrid_tp": 2}
BAD = {"quantize": (1, "quant_type = 'float8_per_row'", "needs"), "parallel_3d": (8, "ring_size = 2", "log-sum-exp")}


def generate(recipe: str, gpus: int, model: Path, out: Path, *flags: str) -> subprocess.CompletedProcess:
    """``sglang generate`` with a recipe."""
    return run(
        ["sglang", "generate", "--backend", "diffusers", "--model-path", model, "--prompt", "red apple",
         "--width", "64", "--height", "64", "--num-inference-steps", "12", "--seed", "1", "--output-path", out,
         "--warmup-mode", "off", "--master-port", next(PORTS),
         *(() if recipe == "attention_native" else ("--attention-backend", "torch_sdpa")),
         "--num-gpus", gpus, "--cache-dit-config", ROOT / "configs" / f"{recipe}.yaml", *flags],
        env=host_environment(), timeout=900,
    )


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")

    def task(recipe, gpus):
        cached = ("--cache-dit-params", json.dumps(EAGER)) if recipe in CACHED else ()
        return lambda: generate(recipe, gpus, models["flux"], folder / recipe, *cached)

    everything = GOOD | {recipe: gpus for recipe, (gpus, *_) in BAD.items()}
    done = run_together(*(task(recipe, gpus) for recipe, gpus in everything.items()))
    return dict(zip(everything, done, strict=True)), folder


def drawn(runs, recipe: str) -> np.ndarray:
    """The one picture of a run."""
    done, folder = runs
    assert done[recipe].returncode == 0, done[recipe].stderr[-3000:]
    (path,) = (folder / recipe).glob("*.png")
    return np.asarray(Image.open(path), dtype=float)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((one - other) ** 2), 1e-9)))


def counts(runs, recipe: str) -> tuple[int, int, int]:
    """Steps, computed and cached of the report; it is written once, whatever the number of ranks."""
    done = runs[0][recipe]
    found = re.findall(r"cache-dit: \S+: (\d+) steps, (\d+) computed, (\d+) cached \(cond\)", done.stdout + done.stderr)
    assert len(found) == 1
    return tuple(map(int, found[0]))


@pytest.mark.parametrize("recipe", CACHED)
def test_a_recipe_with_a_cache_draws_and_reports(runs, recipe):
    assert drawn(runs, recipe).std() > 1
    steps, computed, cached = counts(runs, recipe)
    assert steps == computed + cached == 12
    assert cached > 0


@pytest.mark.parametrize("recipe", ["hybrid", "hybrid_tp"])
def test_two_ranks_cache_the_steps_that_one_would(runs, recipe):
    assert counts(runs, recipe) == counts(runs, "cache_taylorseer")


def test_two_ranks_draw_the_picture_that_one_would(runs):
    assert psnr(drawn(runs, "hybrid_tp"), drawn(runs, "cache_taylorseer")) > 40


def test_the_attention_of_a_file_draws(runs):
    assert drawn(runs, "attention_native").std() > 1


@pytest.mark.parametrize("recipe", BAD)
def test_what_this_machine_cannot_do_is_one_line_before_weights_load(runs, recipe):
    done = runs[0][recipe]
    _, *words = BAD[recipe]
    lines = [line for line in done.stderr.splitlines() if "cache-dit: error" in line]
    assert done.returncode == 2, done.stderr[-3000:]
    assert len(lines) == 1
    for word in (f"{recipe}.yaml", *words):
        assert word in lines[0]
    assert "Traceback" not in done.stderr + done.stdout
