"""Hours of load on one server: ``python -m tests.soak.soak --minutes 60``.

Starts a real server, lets clients send mixed requests and changes, and watches every answer, ``/metrics`` against the
sum of the reports, and the resident memory of all of the server's processes. Exit status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from tests.e2e.conftest import serving

from .load import Load, differences, scrape

SAMPLE_S = 5.0
SETTLED = 1 / 3
"""The first part of a run is left out of the slope: allocators and caches still fill."""


class Memory(threading.Thread):
    """Resident bytes of a process and all its descendants, sampled until stopped."""

    def __init__(self, root: psutil.Process):
        super().__init__(daemon=True)
        self._root = root
        self._end = threading.Event()
        self.samples: list[tuple[float, int]] = []

    def run(self) -> None:
        """Sample."""
        while not self._end.wait(SAMPLE_S):
            self.samples.append((time.monotonic(), self._resident()))

    def _resident(self) -> int:
        total = 0
        for process in [self._root, *self._root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def stop(self) -> None:
        """Stop sampling."""
        self._end.set()
        self.join()

    def slope(self) -> float | None:
        """MiB a minute over the settled part (least squares), None with too few samples."""
        settled = self.samples[int(len(self.samples) * SETTLED):]
        if len(settled) < 4:
            return None
        times = [(at - settled[0][0]) / 60 for at, _ in settled]
        sizes = [size / 2**20 for _, size in settled]
        mean_t, mean_s = sum(times) / len(times), sum(sizes) / len(sizes)
        spread = sum((t - mean_t) ** 2 for t in times)
        return sum((t - mean_t) * (s - mean_s) for t, s in zip(times, sizes, strict=True)) / spread


def server_process(url: str) -> psutil.Process:
    """The topmost process of the server that listens at ``url``."""
    port = int(url.rpartition(":")[2])
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(each.laddr.port == port for each in process.net_connections("tcp") if each.status == "LISTEN"):
                return process
    raise RuntimeError(f"no child process listens at {url}")


def soak(model: Path, args: argparse.Namespace) -> dict:
    """Run the load and return the report."""
    with tempfile.TemporaryDirectory() as folder, serving(model, Path(folder), "--enable-metrics") as url:
        memory = Memory(server_process(url))
        before = scrape(url)
        load = Load(url, seed=args.seed)
        memory.start()
        outcome = load.run(args.clients, requests=args.requests, seconds=args.minutes and args.minutes * 60)
        memory.stop()
        wrong = differences(before, scrape(url), outcome.counted)
    return {
        "seconds": round(outcome.seconds, 1), "answers": outcome.answers, "refused": outcome.refused,
        "changes": outcome.changes, "problems": outcome.problems, "metrics_wrong": wrong,
        "memory_mib": [round(size / 2**20, 1) for _, size in memory.samples],
        "memory_slope_mib_per_minute": memory.slope(),
    }


def verdict(report: dict, limit: float) -> list[str]:
    """What is wrong with a run; ``limit`` in MiB a minute."""
    wrong = [*report["problems"][:20], *report["metrics_wrong"]]
    slope = report["memory_slope_mib_per_minute"]
    if slope is not None and slope > limit:
        wrong.append(f"resident memory grew by {slope:.2f} MiB a minute, allowed {limit:g}")
    if report["answers"] == 0:
        wrong.append("nothing was answered")
    return wrong


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, help="stop after this time")
    parser.add_argument("--requests", type=int, help="stop after so many requests")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--slope-limit", type=float, help="MiB a minute of resident memory; 1, in runs under a quarter of an hour 20"
    )
    parser.add_argument("--model", type=Path, help="a FLUX folder; without it a tiny one is built")
    args = parser.parse_args()
    if args.minutes is None and args.requests is None:
        args.minutes = 3.0
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            from tests.tiny.build import flux

            args.model = flux(Path(folder))
        report = soak(args.model, args)
    # In a short run the allocator's first steps for new sizes look like a slope.
    limit = args.slope_limit or (1.0 if report["seconds"] >= 900 else 20.0)
    wrong = verdict(report, limit)
    print(json.dumps(report | {"wrong": wrong}, indent=2))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
