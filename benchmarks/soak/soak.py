"""Hours of load on one server: ``python -m benchmarks.soak.soak --minutes 60``.

Starts a real server, lets clients send mixed requests and changes, and watches every answer, ``/metrics`` against the
sum of the reports, and the resident memory of all of the server's processes. Prints a table; exit status 1 if anything
is wrong.
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

from benchmarks.soak.load import Load, Outcome, differences, scrape
from benchmarks.soak.memory import Memory, slope
from tests.e2e.conftest import serving

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
    with serving(model, folder, "--enable-metrics", cold=True) as url:
        memory = Memory(server_process(url))
        before = scrape(url)
        load = Load(url, seed=seed)
        load.materialize()
        memory.start()
        outcome = load.run(clients, requests=requests, seconds=seconds)
        memory.stop()
        return outcome, differences(before, scrape(url), outcome.counted), memory


def report_of(outcome: Outcome, metrics_wrong: list[str], memory: Memory) -> dict[str, Any]:
    """Figures of a run."""
    sizes = {name: [round(size, 1) for _, size in memory.sizes(name)] for name in ("server", "worker", "helper")}
    found = slope(memory.sizes())
    return {
        "seconds": round(outcome.seconds, 1), "answers": outcome.answers, "refused": outcome.refused,
        "changes": outcome.changes, "statuses": dict(sorted(outcome.statuses.items())),
        "problems": outcome.problems, "metrics_wrong": metrics_wrong, "memory_mib": sizes,
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


def table(report: dict[str, Any], wrong: list[str]) -> str:
    """A run's figures in a few lines, and what is wrong with it."""
    errors = sum(count for status, count in report["statuses"].items() if status >= 500)
    found = report["slope_mib_per_minute"]
    rows = [
        ("time", f"{report['seconds']:g} s"),
        ("requests answered with pictures", report["answers"]),
        ("requests refused, as they had to be", report["refused"]),
        ("changes of the server", report["changes"]),
        ("answers by status", ", ".join(f"{count} x {status}" for status, count in report["statuses"].items())),
        ("answers with a 5xx", errors),
        ("answers that were not what was asked", len(report["problems"])),
        ("/metrics against the sum of the reports", "differs" if report["metrics_wrong"] else "equal"),
    ]
    rows += [
        (f"memory of the {name}, first to last", f"{sizes[0]:g} to {sizes[-1]:g} MiB")
        for name, sizes in report["memory_mib"].items() if sizes and any(sizes)
    ]
    rows.append(("slope in the second half", "unknown" if found is None else f"{found[0]} +- {found[1]} MiB a minute"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    return "\n".join([*lines, *(f"wrong: {each}" for each in wrong), "failed" if wrong else "passed"])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, help="stop after this time")
    parser.add_argument("--requests", type=int, help="stop after so many requests")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slope-limit", type=float, default=LIMIT, help="MiB a minute of resident memory")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
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
    if args.json is not None:
        args.json.write_text(json.dumps(report | {"wrong": found}, indent=2))
    print(table(report, found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
