"""Tiny models, and runs of the real host with and without the plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PORTS = iter(range(43100, 43900))


def host_environment(**extra: str) -> dict[str, str]:
    """The environment of a host process: no hub, one thread, nothing of the caller's cache settings."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SGLANG_")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path} | extra


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders of the tiny models by family."""
    folder = tmp_path_factory.mktemp("models")
    names = ["flux", "qwen", "wan21", "wan22"]
    built = subprocess.run(
        [sys.executable, "-m", "tests.tiny.build", str(folder), *names],
        cwd=ROOT, env=host_environment(), check=True, capture_output=True, text=True,
    )
    paths = [Path(line) for line in built.stdout.splitlines() if line.startswith(str(folder))]
    return dict(zip(names, paths, strict=True))


def run_probe(jobs: list[dict], folder: Path, **environment: str) -> dict[str, list[dict]]:
    """Results of ``jobs`` by name; see probe.py."""
    for job in jobs:
        job["server"]["master_port"] = next(PORTS)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.probe", str(folder / "jobs.json"), str(folder / "out.pt")],
        cwd=ROOT, env=host_environment(**environment), capture_output=True, text=True, timeout=1800, errors="replace",
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(folder / "out.pt")


def run_together(*tasks):
    """Results of callables that run at the same time, one a core."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]
