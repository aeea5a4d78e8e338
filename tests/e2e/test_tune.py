"""A tuning run through the real host: its file serves, the same command goes on from what is known."""

from __future__ import annotations

import json
import re
import signal
import time

import pytest
import yaml

from tests.e2e.conftest import run_probe
from tests.processes import ROOT, Forked, end, host_environment

STEPS, BUDGET = 6, 4
GUIDED = {"negative_prompt": "green cat", "true_cfg_scale": 3.0}
BASE = {"width": 128, "height": 128, "prompt": "red apple", "seed": 1, **GUIDED}
DEMO = ROOT / "sglang_cachedit_plugin" / "demo" / "FLUX.1-dev"


def start(folder) -> Forked:
    command = [
        "sglang-cachedit", "tune", "--model-path", DEMO,
        "--prompts", folder / "prompts.txt", "--steps", STEPS, "--size", "128x128", "--budget", BUDGET,
        "--tune-limit", "2", "--heldout-limit", "1", "--evaluations", "1", "--work", folder / "work",
        "--shares", "0.5", "--report", folder / "report", "--out", folder / "tuned.yaml", "--baselines", "plain",
        "--server", "attention_backend=torch_sdpa",
        *(f"--request={name}={value}" for name, value in GUIDED.items()),
    ]
    log = folder / "log"
    log.write_text("")
    return Forked(command, cwd=ROOT, env=host_environment(), out=log)


def finish(process: Forked, folder, status: int = 0) -> str:
    """What the run said, when it has ended with ``status``."""
    try:
        left = process.wait(900)
    finally:
        end(process)
    said = (folder / "log").read_text(errors="replace")
    assert left == status, said[-4000:]
    return said


def served(said: str) -> int:
    """Requests that a run gave to the host."""
    return int(re.findall(r"(\d+) requests served", said)[-1])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Folder of a run that was interrupted during its trials and finished by the same command."""
    folder = tmp_path_factory.mktemp("tune")
    (folder / "prompts.txt").write_text("blue moon\nred apple\ngreen cat\n")
    process = start(folder)
    known = folder / "work" / "evaluations"
    deadline = time.monotonic() + 600
    while len(list(known.glob("*.npz"))) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = finish(process, folder, status=130)
    assert "Interrupted. The same command goes on" in said
    assert not (folder / "tuned.yaml").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in known.glob("*.npz")}
    assert len(kept) >= 4
    assert served(finish(start(folder), folder)) == len(list(known.glob("*.npz"))) - len(kept)
    assert all((known / name).stat().st_mtime_ns == when for name, when in kept.items())
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


def test_the_same_command_measures_nothing_again_and_comes_to_the_same(tuned):
    before = (tuned / "tuned.yaml").read_bytes()
    assert served(finish(start(tuned), tuned)) == 0
    assert (tuned / "tuned.yaml").read_bytes() == before


def test_the_host_serves_the_file(tuned):
    file = yaml.safe_load((tuned / "tuned.yaml").read_text())
    rows = {row["steps"]: row for row in file["cache_config"].get("schedules", [])}
    server = {"model_path": str(DEMO), "cache_dit_config": str(tuned / "tuned.yaml")}
    requests = [BASE | {"num_inference_steps": STEPS}, BASE | {"num_inference_steps": 9}]
    exact, other = run_probe([{"name": "tuned", "server": server, "requests": requests}], tuned / "probe")["tuned"]
    assert exact["error"] is None and exact["report"]["reason"] is None
    branches = exact["report"]["transformers"]["transformer"]["branches"]
    assert set(branches) == {"cond", "uncond"}
    assert sum(len(branch["computed"]) for branch in branches.values()) == 2 * BUDGET
    if rows:
        masks = {"cond": rows[STEPS]["mask"], "uncond": rows[STEPS].get("uncond_mask", rows[STEPS]["mask"])}
        for branch, mask in masks.items():
            assert branches[branch]["computed"] == [step for step, one in enumerate(mask) if one == "1"]
        assert "resampled over timesteps" in other["report"]["reason"] or "step number" in other["report"]["reason"]
        assert other["report"]["computed_steps"] < 9
