"""A tuning run through the real host: its file serves, the same command goes on from what is known."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from .conftest import ROOT, host_environment, run_probe

STEPS, BUDGET = 6, 4
BASE = {
    "width": 64, "height": 64, "prompt": "red apple", "seed": 1, "negative_prompt": "green cat", "true_cfg_scale": 3.0,
}
MAIN = "import sys; from sglang_cachedit_plugin.cli import main; sys.exit(main())"


def tune(models, folder) -> subprocess.CompletedProcess:
    command = [
        sys.executable, "-c", MAIN, "tune", "--model-path", str(models["flux"]),
        "--prompts", str(folder / "prompts.txt"), "--steps", str(STEPS), "--size", "64x64", "--budget", str(BUDGET),
        "--tune-limit", "1", "--heldout-limit", "1", "--evaluations", "1", "--work", str(folder / "work"),
        "--shares", "0.5", "--report", str(folder / "report"), "--out", str(folder / "tuned.yaml"), "--peers", "plain",
        "--server", "attention_backend=torch_sdpa", "--request", "negative_prompt=green cat",
        "--request", "true_cfg_scale=3.0",
    ]
    environment = host_environment()
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def tuned(models, tmp_path_factory):
    """Folder of a finished run."""
    folder = tmp_path_factory.mktemp("tune")
    (folder / "prompts.txt").write_text("blue moon\nred apple\ngreen cat\n")
    done = tune(models, folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def test_the_run_leaves_a_file_and_a_report(tuned):
    found = yaml.safe_load((tuned / "tuned.yaml").read_text())
    assert found["cache_config"]["steps_computation_policy"] == "static"
    assert set(found["profiles"]) <= {"tuned-50"}
    results = json.loads((tuned / "report" / "results.json").read_text())
    (grid,) = results["grids"]
    assert grid["chosen"] == f"tuned-{BUDGET}"
    points = {point["name"]: point for point in grid["points"]}
    assert points[f"tuned-{BUDGET}"]["computed"] == BUDGET
    assert {"fewer-4", "growing-4", "growing-output-4"} <= set(points)
    assert (tuned / "report" / "report.html").stat().st_size > 10_000
    assert {row["images"]["chosen"] for row in results["sheet"]} == {"pictures/0-chosen.png"}


def test_the_same_command_measures_nothing_again_and_comes_to_the_same(models, tuned):
    before = (tuned / "tuned.yaml").read_bytes()
    done = tune(models, tuned)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "] 0 requests served" in done.stderr
    assert (tuned / "tuned.yaml").read_bytes() == before


def test_the_host_serves_the_file(models, tuned):
    file = yaml.safe_load((tuned / "tuned.yaml").read_text())
    rows = {row["steps"]: row for row in file["cache_config"].get("schedules", [])}
    server = {"model_path": str(models["flux"]), "cache_dit_config": str(tuned / "tuned.yaml")}
    requests = [BASE | {"num_inference_steps": STEPS}, BASE | {"num_inference_steps": 9}]
    exact, other = run_probe([{"name": "tuned", "server": server, "requests": requests}], tuned / "probe")["tuned"]
    assert exact["error"] is None and exact["report"]["reason"] is None
    branches = exact["report"]["transformers"]["transformer"]["branches"]
    assert set(branches) == {"cond", "uncond"}
    assert all(len(branch["computed"]) == BUDGET for branch in branches.values())
    if rows:
        computed = [step for step, one in enumerate(rows[STEPS]["mask"]) if one == "1"]
        assert branches["cond"]["computed"] == computed
        assert "resampled over timesteps" in other["report"]["reason"] or "step number" in other["report"]["reason"]
        assert other["report"]["computed_steps"] == 6
