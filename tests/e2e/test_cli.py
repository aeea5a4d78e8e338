"""The real command line: the main job on both backends, and one line for every bad setting."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import PORTS, ROOT, host_environment, run_together

SGLANG = str(Path(sys.executable).with_name("sglang"))

VARIABLES = {
    "misspelt variable": ({"WARMPU": "4"}, "SGLANG_CACHE_DIT_WARMPU", "did you mean 'SGLANG_CACHE_DIT_WARMUP'"),
    "not a number": ({"RDT": "abc"}, "SGLANG_CACHE_DIT_RDT = 'abc'", "a number from 0 to 1"),
    "out of range": ({"WARMUP": "-4"}, "SGLANG_CACHE_DIT_WARMUP = -4", "at least 0"),
    "order": ({"TS_ORDER": "7"}, "SGLANG_CACHE_DIT_TS_ORDER = 7", "from 1 to 2"),
    "policy": ({"SCM_POLICY": "statik"}, "SGLANG_CACHE_DIT_SCM_POLICY = 'statik'", "did you mean 'static'"),
    "both calibrators": ({"TAYLORSEER": "1", "DMD": "1"}, "SGLANG_CACHE_DIT_DMD", "exclude each other"),
    "bins that do not pair": ({"SCM_COMPUTE_BINS": "4,2"}, "SGLANG_CACHE_DIT_SCM_CACHE_BINS", "together or not at all"),
    "second transformer": ({"SECONDARY_FN": "x"}, "SGLANG_CACHE_DIT_SECONDARY_FN = 'x'", "a whole number"),
    "switch": ({"ENABLED": "ja"}, "SGLANG_CACHE_DIT_ENABLED = 'ja'", "true or false"),
}
FILES = {
    "unknown key": ({"cache_config": {"max_warmup_stepz": 4}}, "max_warmup_stepz", "did you mean 'max_warmup_steps'"),
    "unknown section": ({"cache_confg": {}}, "cache_confg", "did you mean 'cache_config'"),
    "wrong type": ({"cache_config": {"residual_diff_threshold": "abc"}}, "residual_diff_threshold", "a number"),
    "mask of another length": (
        {"cache_config": {"num_inference_steps": 28, "steps_computation_mask": [1, 0, 1]}},
        "steps_computation_mask", "expected 28 entries",
    ),
    "bins that do not fit": (
        {"cache_config": {"num_inference_steps": 28, "scm_compute_bins": [2, 2], "scm_cache_bins": [2]}},
        "scm_compute_bins", "cover 6 steps",
    ),
    "empty": ("", "--cache-dit-config", "the file is empty"),
    "broken": ("cache_config: [", "--cache-dit-config", "not valid YAML"),
    "missing": (None, "--cache-dit-config", "no such file"),
}


def _run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=ROOT, env=host_environment(**environment), capture_output=True, text=True, timeout=900,
        errors="replace",
    )


def _generate(model: Path, out: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    return _run(
        [SGLANG, "generate", "--model-path", str(model), "--prompt", "red apple", "--width", "64", "--height", "64",
         "--num-inference-steps", "12", "--seed", "1", "--output-path", str(out), "--warmup-mode", "off",
         "--attention-backend", "torch_sdpa", "--master-port", str(next(PORTS)), *flags],
        **environment,
    )


@pytest.fixture(scope="module")
def bad_runs(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    tasks, names = [], []
    for index, (name, (variables, *_)) in enumerate(VARIABLES.items()):
        environment = {f"SGLANG_CACHE_DIT_{key}": value for key, value in variables.items()}
        if index % 3 == 0:
            command = [SGLANG, "serve", "--model-path", str(models["flux"]), "--port", str(next(PORTS))]
            tasks.append(lambda c=command, e=environment: _run(c, **e))
        else:
            tasks.append(lambda e=environment: _generate(models["flux"], folder, **e))
        names.append(name)
    for index, (name, (content, *_)) in enumerate(FILES.items()):
        path = folder / f"{index}.yaml"
        if content is not None:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        backend = ("sglang", "diffusers")[index % 2]
        flags = ("--backend", backend, "--cache-dit-config", str(path))
        tasks.append(lambda f=flags: _generate(models["flux"], folder, *f))
        names.append(name)
    return dict(zip(names, run_together(*tasks), strict=True))


@pytest.mark.parametrize("name", [*VARIABLES, *FILES])
def test_a_bad_setting_is_one_line_and_status_2(bad_runs, name):
    run = bad_runs[name]
    _, *expected = (VARIABLES | FILES)[name]
    lines = [line for line in run.stderr.splitlines() if "cache-dit: error" in line]
    assert run.returncode == 2, run.stderr[-3000:]
    assert len(lines) == 1
    for part in expected:
        assert part in lines[0]
    assert "Traceback" not in run.stderr + run.stdout


@pytest.fixture(scope="module")
def good_runs(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    file = folder / "cache.yaml"
    file.write_text("cache_config: {residual_diff_threshold: 0.9, max_warmup_steps: 2}\n")
    native, diffusers, both = run_together(
        lambda: _generate(
            models["flux"], folder / "native", SGLANG_CACHE_DIT_ENABLED="true", SGLANG_CACHE_DIT_RDT="0.9"
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
