"""Scenarios in real gloo processes.

``python -m tests.dist.world SIZE OUT MODULE`` imports once, forks SIZE ranks and runs every function of MODULE's
``SCENARIOS`` on all of them, one after the other. OUT.<rank> holds each rank's results by scenario.
"""

from __future__ import annotations

import datetime
import importlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import processes
from tests.unit.blocks import known_classes

LIMIT = 30
"""Seconds that a rank waits for another before it gives up."""


@contextmanager
def collectives() -> Iterator[Counter]:
    """Counts calls of collectives by name."""
    counts: Counter = Counter()
    names = ("all_reduce", "all_gather", "broadcast", "barrier", "all_gather_object")
    originals = {name: getattr(dist, name) for name in names}

    def counted(name: str):
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counted(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def run(size: int, module: str, folder: Path) -> dict[str, list[Any]]:
    """Results of every scenario of ``module``, by name and rank."""
    out = folder / f"world{size}"
    done = processes.run(["-m", "tests.dist.world", size, out, module], env=processes.host_environment(), timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    ranks = [torch.load(f"{out}.{rank}") for rank in range(size)]
    return {name: [each[name] for each in ranks] for name in ranks[0]}


def _rank(rank: int, size: int, out: str, scenarios: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    dist.init_process_group(
        "gloo", init_method=f"file://{out}.store", rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=LIMIT),
    )
    results = {}
    with known_classes():
        for name, scenario in scenarios.items():
            try:
                results[name] = scenario(rank)
                dist.barrier()
            except BaseException as error:
                raise RuntimeError(f"rank {rank}: {name}") from error
    torch.save(results, f"{out}.{rank}")


def main() -> None:
    """Command line."""
    size, out = int(sys.argv[1]), sys.argv[2]
    scenarios = importlib.import_module(sys.argv[3]).SCENARIOS
    Path(f"{out}.store").unlink(missing_ok=True)
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                _rank(rank, size, out, scenarios)
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    sys.exit(_wait(children))


def _wait(children: list[int]) -> int:
    """0 once all have ended well; the others are ended with the first that fails."""
    left, deadline = set(children), time.monotonic() + 5 * LIMIT
    failed = False
    while left:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            left.discard(child)
            failed = failed or status != 0
        elif failed or time.monotonic() > deadline:
            for each in left:
                os.kill(each, signal.SIGKILL)
                os.waitpid(each, 0)
            return 1
        else:
            time.sleep(0.02)
    return int(failed)


if __name__ == "__main__":
    main()
