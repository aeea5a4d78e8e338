"""Tiny models, and runs of the real host with and without the plugin; servers that the tests of HTTP share."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import torch
from filelock import FileLock
from playwright.sync_api import sync_playwright

from tests.processes import ROOT, end, host_environment, run, start

CHROMIUM_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]
NO_BROWSER = "no Chromium: `make browser` installs it, or name one in CHROMIUM"
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


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders of the tiny models by family; all workers of a session of tests share them."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, names = shared / "models", ["flux", "qwen", "qwen_edit", "wan21", "wan22"]
    with FileLock(f"{folder}.lock"):
        if not (built := folder / "built.json").exists():
            done = run(["-m", "tests.tiny.build", folder, *names], env=host_environment(), timeout=300)
            assert done.returncode == 0, done.stderr[-4000:]
            built.write_text(json.dumps([line for line in done.stdout.splitlines() if line.startswith(str(folder))]))
    return dict(zip(names, map(Path, json.loads(built.read_text())), strict=True))


@pytest.fixture(scope="module")
def browser():
    """A real Chromium; without one its tests are skipped, and fail where BROWSER says that it is required.

    Not for the whole session: Playwright keeps an event loop running, in which no other test can start one.
    """
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        (pytest.fail if os.environ.get("BROWSER") == "required" else pytest.skip)(NO_BROWSER)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield chromium
        chromium.close()


def run_module(name: str, asked: object, folder: Path, **environment: str):
    """What ``tests.e2e.<name>`` writes (torch.save) when it is run in a process of its own with ``asked`` as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "in.json").write_text(json.dumps(asked))
    done = run(
        ["-m", f"tests.e2e.{name}", folder / "in.json", folder / "out.pt"], env=host_environment(**environment),
        timeout=1800,
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
def serving(model: Path, folder: Path, *flags: str, cold: bool = False, **environment: str):
    """Address of a server that lives as long as the block; a ``cold`` one is the command line itself, not a fork."""
    port, _, master, scheduler, _ = free_ports(5)  # the port after the server's belongs to the host's broker
    log = folder / "server.log"
    command = [
        "sglang", "serve", "--model-path", str(model), "--port", str(port), "--master-port", str(master),
        "--scheduler-port", str(scheduler), "--warmup-mode", "off", "--attention-backend", "torch_sdpa",
        # Without the last an idle server spins a core that other tests need.
        "--output-path", str(folder / "out"), "--sleep-on-idle", *flags,
    ]
    process = start(command, cwd=folder, env=host_environment(**environment), out=log, cold=cold)
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
        end(process)


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
