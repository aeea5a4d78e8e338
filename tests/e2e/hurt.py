"""A real server that fails when it is told to, and what must hold after each fault."""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.conftest import ROOT, serving

STEPS = 6
WANTED = {
    "prompt": "red apple", "width": 64, "height": 64, "num_inference_steps": STEPS, "seed": 1, "enable_cache_dit": True,
    "negative_prompt": "cat", "true_cfg_scale": 2.0,
}
KNOBS = {
    "residual_diff_threshold": 0.95, "max_warmup_steps": 2, "max_continuous_cached_steps": 1, "enable_taylorseer": True,
}
EDGES = {**KNOBS, "Fn_compute_blocks": 2, "Bn_compute_blocks": 1}


class Server:
    """A server that fails when it is told to."""

    def __init__(self, url: str, folder: Path):
        self.url, self.folder = url, folder
        self.fresh: dict[str, tuple[str, dict]] = {}
        self.rest: dict[str, int] = {}
        self.resident = 0.0

    def ask(self, knobs: dict = KNOBS, timeout: float = 300, **fields) -> httpx.Response:
        """One picture."""
        body = WANTED | {"cache_dit_params": knobs} | fields
        return httpx.post(f"{self.url}/generate", json=body, timeout=timeout)

    def picture(self, knobs: dict = KNOBS, **fields) -> tuple[str, dict]:
        """A picture that must come, and which steps were cached."""
        answer = self.ask(knobs, **fields)
        assert answer.status_code == 200, answer.text
        stats = answer.json()["cache_stats"]
        assert stats["enabled"] and stats["reason"] is None, stats["reason"]
        return answer.json()["images"][0], stats["transformers"]["transformer"]["branches"]

    def arm(self, place: str, kind: str, call: int = 0) -> None:
        """The ``call``-th visit of ``place`` from now on fails; see faults.py."""
        (self.folder / "fault.new").write_text(json.dumps({"place": place, "call": call, "kind": kind}))
        (self.folder / "fault.new").replace(self.folder / "fault.json")

    def armed(self) -> bool:
        """Whether the fault has not struck yet."""
        return (self.folder / "fault.json").exists()

    def level(self) -> dict[str, int]:
        """Live tensors of the worker after its last request, and their bytes."""
        return json.loads((self.folder / "level.json").read_text())

    def wait(self) -> None:
        """Until the worker has nothing left to do: its answer to a question comes after all requests."""
        deadline = time.monotonic() + 120
        while httpx.get(f"{self.url}/v1/cache_dit", timeout=60).json()["workers"]["age_s"] > 1:
            assert time.monotonic() < deadline

    def materialize(self) -> None:
        """What is alive now is the resting level."""
        self.rest, self.resident = self.level(), self.megabytes()

    def megabytes(self) -> float:
        """Resident memory of the worker, MiB."""
        return psutil.Process(self.level()["pid"]).memory_info().rss / 2**20

    def held(self) -> int:
        """Bytes that the cache holds between requests, as it says itself."""
        self.wait()
        replicas = httpx.get(f"{self.url}/v1/cache_dit", timeout=60).json()["workers"]["replicas"]
        return sum(model["buffer_bytes"] for each in replicas for rank in each["ranks"] for model in rank["mounted"])


@contextmanager
def serving_faults(models, folder: Path, *flags: str):
    """A server with the faults' plugin beside the cache's."""
    info = folder / "tiny_faults-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-faults\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[sglang.multimodal_gen.plugins]\ntiny_faults = tests.e2e.faults:register\n")
    path = os.pathsep.join([str(ROOT), str(folder)])
    with serving(models["flux"], folder, *flags, PYTHONPATH=path, FAULTS=str(folder)) as url:
        yield Server(url, folder)


def meets_both_kinds_of_steps(server: Server) -> None:
    """The picture that faults are tried on has cached and computed steps and asks the similarity."""
    branches = server.fresh["plain"][1]
    assert set(branches) == {"cond", "uncond"}
    for branch in branches.values():
        assert len(branch["cached"]) >= 2 and len(branch["computed"]) >= 3 and branch["residual_diffs"]


def check(server: Server) -> None:
    """The next picture is a fresh server's, and memory is at its resting level."""
    assert not server.armed()
    assert server.picture() == server.fresh["plain"]
    level = server.level()
    assert level["pid"] == server.rest["pid"]
    assert level["tensors"] <= server.rest["tensors"] and level["bytes"] <= server.rest["bytes"]
    assert server.held() == 0


def survives(server: Server, place: str, kind: str, call: int = 0) -> None:
    """The request that meets a fault is answered with one line, and the next one is as if nothing had been."""
    server.arm(place, kind, call)
    answer = server.ask()
    assert answer.status_code == 500 and "injected" in answer.json()["detail"]
    assert len(answer.json()["detail"].splitlines()) == 1
    check(server)


def survives_nan(server: Server, call: int) -> None:
    """NaN in a block's output: these steps are computed, the report says so."""
    server.arm("block", "nan", call)
    answer = server.ask()
    assert answer.status_code == 200
    assert "were NaN, these steps were computed" in answer.json()["cache_stats"]["reason"]
    check(server)


def survives_a_hang_up(server: Server) -> None:
    """A client that goes away while the worker denoises."""
    server.arm("block", "2", 3)
    with pytest.raises(httpx.ReadTimeout):
        server.ask(timeout=0.5)
    server.wait()
    check(server)


def is_not_larger(server: Server) -> None:
    """The worker's resident memory is what it was at rest, but for what an allocator keeps."""
    assert server.megabytes() - server.resident < 40
