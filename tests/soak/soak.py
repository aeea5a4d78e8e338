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
from pathlib import Path
from typing import Any

import psutil

from tests.e2e.conftest import serving

from .load import Load, Outcome, differences, scrape
from .memory import Memory, slope

LIMIT = 1.0
"""MiB a minute by which memory may grow at most, with 95 % confidence."""


def server_process(url: str) -> psutil.Process:
    """The topmost process of the server that listens at ``url``."""
    port = int(url.rpartition(":")[2])
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(each.laddr.port == port for each in process.net_connections("tcp") if each.status == "LISTEN"):
                return process
    raise RuntimeError(f"no child process listens at {url}")


def soak(
    model: Path, folder: Path, *, clients: int, requests: int | None = None, seconds: float | None = None, seed: int = 0
) -> tuple[Outcome, list[str], Memory]:
    """What came of a run, where ``/metrics`` differs from the reports, and the server's memory."""
    with serving(model, folder, "--enable-metrics") as url:
        memory = Memory(server_process(url))
        before = scrape(url)
        load = Load(url, seed=seed)
        load.settle()
        memory.start()
        outcome = load.run(clients, requests=requests, seconds=seconds)
        memory.stop()
        return outcome, differences(before, scrape(url), outcome.counted), memory


def report_of(outcome: Outcome, metrics_wrong: list[str], memory: Memory) -> dict[str, Any]:
    """Figures of a run."""
    sizes = {name: memory.sizes(name) for name in ("server", "worker", "helper")}
    found = slope(memory.sizes())
    return {
        "seconds": round(outcome.seconds, 1), "answers": outcome.answers, "refused": outcome.refused,
        "changes": outcome.changes, "problems": outcome.problems, "metrics_wrong": metrics_wrong,
        "memory_mib": {name: [round(size, 1) for _, size in each[:: max(1, len(each) // 40)]]
                       for name, each in sizes.items()},
        "slope_mib_per_minute": None if found is None else [round(each, 3) for each in found],
    }


def verdict(report: dict[str, Any], limit: float = LIMIT) -> list[str]:
    """What is wrong with a run; ``limit`` in MiB a minute."""
    wrong = [*report["problems"][:20], *report["metrics_wrong"]]
    found = report["slope_mib_per_minute"]
    if found is None:
        wrong.append("too short to tell whether memory grows")
    elif sum(found) > limit:
        wrong.append(f"resident memory grows by {found[0]:.2f} +- {found[1]:.2f} MiB a minute, allowed {limit:g}")
    if report["answers"] == 0:
        wrong.append("nothing was answered")
    return wrong


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, help="stop after this time")
    parser.add_argument("--requests", type=int, help="stop after so many requests")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slope-limit", type=float, default=LIMIT, help="MiB a minute of resident memory")
    parser.add_argument("--model", type=Path, help="a FLUX folder; without it one of six blocks is built")
    args = parser.parse_args()
    if args.minutes is None and args.requests is None:
        args.minutes = 15.0
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            from tests.tiny.build import flux

            args.model = flux(Path(folder), 3, 3)
        outcome, wrong, memory = soak(
            args.model, Path(folder), clients=args.clients, requests=args.requests,
            seconds=args.minutes and args.minutes * 60, seed=args.seed,
        )
    report = report_of(outcome, wrong, memory)
    found = verdict(report, args.slope_limit)
    print(json.dumps(report | {"wrong": found}, indent=2))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
