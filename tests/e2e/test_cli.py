"""The real command line: the main job on both backends, and a bad setting of each kind that ends the start."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import PORTS, run_together
from tests.processes import host_environment, run

STATUS_2 = {
    # name: command, how it starts, file, environment, words of the one line. All mistakes:
    # tests/unit/config/test_bad_settings.py
    "environment, generate": (
        "generate", {}, None, {"SGLANG_CACHE_DIT_WARMPU": "4"}, ["SGLANG_CACHE_DIT_WARMPU", "did you mean"],
    ),
    "environment, serve": (
        "serve", {"cold": True}, None, {"SGLANG_CACHE_DIT_TAYLORSEER": "1", "SGLANG_CACHE_DIT_DMD": "1"},
        ["SGLANG_CACHE_DIT_DMD", "exclude each other"],
    ),
    "file, sglang": (
        "generate", {"cold": True}, "cache_config: {max_warmup_stepz: 4}", {},
        ["max_warmup_stepz", "did you mean 'max_warmup_steps'"],
    ),
    "file, diffusers": ("generate", {"backend": "diffusers"}, "cache_confg: {}", {}, ["did you mean 'cache_config'"]),
}


def _generate(
    model: Path, out: Path, *flags: str, cold: bool = False, **environment: str
) -> subprocess.CompletedProcess:
    return run(
        ["sglang", "generate", "--model-path", model, "--prompt", "red apple", "--width", "64", "--height", "64",
         "--num-inference-steps", "12", "--seed", "1", "--output-path", out, "--warmup-mode", "off",
         "--attention-backend", "torch_sdpa", "--master-port", next(PORTS), *flags],
        env=host_environment(**environment), timeout=900, cold=cold,
    )


@pytest.mark.parametrize("name", STATUS_2)
def test_a_bad_setting_is_one_line_and_status_2(models, name, tmp_path):
    command, how, content, environment, expected = STATUS_2[name]
    flags = ["--backend", how.get("backend", "sglang")]
    if content is not None:
        file = tmp_path / "cache.yaml"
        file.write_text(content)
        flags += ["--cache-dit-config", str(file)]
    cold = how.get("cold", False)
    if command == "generate":
        done = _generate(models["flux"], tmp_path, *flags, cold=cold, **environment)
    else:
        serve = ["sglang", "serve", "--model-path", models["flux"], "--port", next(PORTS), *flags]
        done = run(serve, env=host_environment(**environment), timeout=900, cold=cold)
    lines = [line for line in done.stderr.splitlines() if "cache-dit: error" in line]
    assert done.returncode == 2, done.stderr[-3000:]
    assert len(lines) == 1
    for part in expected:
        assert part in lines[0]
    assert "Traceback" not in done.stderr + done.stdout


@pytest.fixture(scope="module")
def good_runs(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    file = folder / "cache.yaml"
    file.write_text("cache_config: {residual_diff_threshold: 0.9, max_warmup_steps: 2}\n")
    native, diffusers, both = run_together(
        lambda: _generate(
            models["flux"], folder / "native", cold=True, SGLANG_CACHE_DIT_ENABLED="true", SGLANG_CACHE_DIT_RDT="0.9"
        ),
        lambda: _generate(
            models["flux"], folder / "diffusers", "--backend", "diffusers", "--cache-dit-config", str(file)
        ),
        lambda: _generate(
            models["flux"], folder / "both", "--cache-dit-config", str(file), SGLANG_CACHE_DIT_RDT="0.0",
            SGLANG_CACHE_DIT_MC="1",
        ),
    )
    return {"native": native, "diffusers": diffusers, "both": both}, folder


@pytest.mark.parametrize("name", ["native", "diffusers", "both"])
def test_the_main_job_draws_a_picture_and_says_what_was_cached(good_runs, name):
    runs, folder = good_runs
    run = runs[name]
    assert run.returncode == 0, run.stderr[-3000:]
    assert list((folder / name).glob("*.png"))
    found = re.findall(r"cache-dit: \S+: (\d+) steps, (\d+) computed, (\d+) cached \(cond\)", run.stdout + run.stderr)
    assert len(found) == 1
    steps, computed, cached = map(int, found[0])
    assert steps == 12 and computed + cached == 12 and cached > 0
    assert "cache-dit enabled" not in run.stdout + run.stderr
    assert len(re.findall(r"cache-dit: on(?:, from cache.yaml|; \d variables from the environment)", run.stderr)) == 1
    row = re.findall(r"^transformer +cond +(\d+) +(\d+) +\d\.\d{3}", run.stdout + run.stderr, re.MULTILINE)
    assert row == [(str(computed), str(cached))]


def test_the_file_works_natively_and_outranks_the_environment(good_runs):
    runs, _ = good_runs
    cached = {
        name: int(re.search(r"(\d+) cached \(cond\)", run.stdout + run.stderr)[1]) for name, run in runs.items()
    }
    # The environment alone would cache nothing (threshold 0); its cap of one in a row still holds.
    assert 0 < cached["both"] < cached["diffusers"]
