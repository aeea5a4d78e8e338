"""Tiny models, and runs of the real host with and without the plugin; servers that the tests of HTTP share."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import openai
import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = "<script>window.taken = 1</script><img src=x onerror='window.taken = 1'>"


class _FreePorts:
    """Master ports that nobody listens on; what runs beside it, worker or session of tests, starts at others."""

    def __init__(self, first: int, count: int):
        share = count // 8
        mine = range(first + share * self._worker(), first + share * (self._worker() + 1))
        self._ports = itertools.cycle(mine)
        for _ in range(os.getpid() * 7 % share):
            next(self._ports)
        # Several threads start hosts at the same time.
        self._lock = threading.Lock()

    @staticmethod
    def _worker() -> int:
        """Number of pytest-xdist's worker, 0 without."""
        return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8

    def __next__(self) -> int:
        with self._lock:
            while True:
                port = next(self._ports)
                with socket.socket() as probe:
                    try:
                        probe.bind(("127.0.0.1", port))
                    except OSError:
                        continue
                return port


PORTS = _FreePorts(43100, 800)


def host_environment(**extra: str) -> dict[str, str]:
    """The environment of a host process: no hub, one thread, nothing of the caller's cache settings."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SGLANG_")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path} | extra


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders of the tiny models by family."""
    folder = tmp_path_factory.mktemp("models")
    names = ["flux", "qwen", "qwen_edit", "wan21", "wan22"]
    built = subprocess.run(
        [sys.executable, "-m", "tests.tiny.build", str(folder), *names],
        cwd=ROOT, env=host_environment(), check=True, capture_output=True, text=True,
    )
    paths = [Path(line) for line in built.stdout.splitlines() if line.startswith(str(folder))]
    return dict(zip(names, paths, strict=True))


def run_module(name: str, asked: object, folder: Path, **environment: str):
    """What ``tests.e2e.<name>`` writes (torch.save) when it is run in a process of its own with ``asked`` as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "in.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [sys.executable, "-m", f"tests.e2e.{name}", str(folder / "in.json"), str(folder / "out.pt")],
        cwd=ROOT, env=host_environment(**environment), capture_output=True, text=True, timeout=1800, errors="replace",
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(folder / "out.pt")


def run_probe(jobs: list[dict], folder: Path, **environment: str) -> dict[str, list[dict]]:
    """Results of ``jobs`` by name; see probe.py."""
    for job in jobs:
        job["server"]["master_port"] = next(PORTS)
    return run_module("probe", jobs, folder, **environment)


def run_together(*tasks):
    """Results of callables that run at the same time, one a core."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


def free_ports(count: int) -> range:
    """That many ports in a row that nothing on this machine uses."""
    while True:
        first = random.randrange(20000, 30000)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return range(first, first + count)


@contextmanager
def serving(model: Path, folder: Path, *flags: str, **environment: str):
    """Address of a server that lives as long as the block."""
    port, _, master, scheduler, _ = free_ports(5)  # the port after the server's belongs to the host's broker
    log = folder / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("sglang")), "serve", "--model-path", str(model), "--port", str(port),
             "--master-port", str(master), "--scheduler-port", str(scheduler), "--warmup-mode", "off",
             # Without the last an idle server spins a core that other tests need.
             "--attention-backend", "torch_sdpa", "--output-path", str(folder / "out"), "--sleep-on-idle", *flags],
            cwd=folder, env=host_environment(**environment), stdout=out, stderr=out, start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 400
        while True:
            try:
                if httpx.get(url + "/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
            time.sleep(0.3)
        yield url
    finally:
        # A test may have ended it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=120)


def path_with_cpu_ops(folder: Path) -> str:
    """A PYTHONPATH whose made-up distribution gives the host's processes operators that Wan and Qwen need on a CPU."""
    info = folder / "tiny_cpu_ops-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-cpu-ops\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[sglang.multimodal_gen.plugins]\ntiny_cpu_ops = tests.tiny.cpu_ops:register\n"
    )
    return os.pathsep.join([str(ROOT), str(folder)])


@pytest.fixture(scope="session")
def video_server(models, tmp_path_factory):
    """A server of tiny Wan."""
    folder = tmp_path_factory.mktemp("video-server")
    with serving(models["wan21"], folder, PYTHONPATH=path_with_cpu_ops(folder)) as url:
        yield url


@pytest.fixture(scope="session")
def server(models, tmp_path_factory):
    """The image server that all tests of HTTP share."""
    with image_server(models, tmp_path_factory.mktemp("image-server"), "--enable-metrics") as url:
        yield url


def image_server(models: dict[str, Path], folder: Path, *flags: str):
    """A server of tiny FLUX with a config file."""
    file = folder / "cache.yaml"
    file.write_text(json.dumps({
        "cache_config": {"max_warmup_steps": 3},
        "profiles": {
            "draft": {"scm_compute_bins": [3, 1, 1, 1], "scm_cache_bins": [2, 2, 2], "scm_policy": "static"},
            SCRIPT: {"max_warmup_steps": 2},
        },
    }))
    return serving(models["flux"], folder, "--cache-dit-config", str(file), *flags)
