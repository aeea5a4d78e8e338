"""Resident memory of a server's processes over time, and whether it grows."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import threading
import time
from collections.abc import Sequence

import psutil

SAMPLE_S = 2.0
BLOCKS = 10
"""Samples close to one another are not independent: the slope is that of so many means."""
T_975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31}
"""Student's t for 95 %, both sides, by degrees of freedom."""
MIB = 2**20


class Memory(threading.Thread):
    """Resident bytes of a process and all its descendants, sampled until stopped."""

    def __init__(self, root: psutil.Process):
        super().__init__(daemon=True)
        self._root = root
        self._end = threading.Event()
        self.samples: list[tuple[float, dict[str, int]]] = []

    def run(self) -> None:
        """Sample."""
        while not self._end.wait(SAMPLE_S):
            self.samples.append((time.monotonic(), self._resident()))

    def _resident(self) -> dict[str, int]:
        found = {}
        for process in [self._root, *self._root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                # The worker names itself; the server is a script, what helps it a `-c`.
                name = "worker" if "sgl_diffusion" in words[0] else "helper" if "-c" in words else "server"
                found[name] = found.get(name, 0) + process.memory_info().rss
        return found

    def stop(self) -> None:
        """Stop sampling."""
        self._end.set()
        self.join()

    def sizes(self, name: str | None = None) -> list[tuple[float, float]]:
        """Minutes since the first sample, and MiB of one kind of process or of all."""
        first = self.samples[0][0] if self.samples else 0.0
        return [
            ((at - first) / 60, (sum(sizes.values()) if name is None else sizes.get(name, 0)) / MIB)
            for at, sizes in self.samples
        ]


def slope(samples: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Slope of the second half, and half the width of its 95 % interval; None with too few samples.

    Least squares through the means of consecutive blocks of samples.

    Args:
        samples: place (e.g. minutes) and value.
    """
    late = samples[len(samples) // 2 :]
    blocks = min(BLOCKS, len(late) // 3)
    if blocks < 4:
        return None
    cuts = [round(index * len(late) / blocks) for index in range(blocks + 1)]
    parts = [late[start:end] for start, end in itertools.pairwise(cuts)]
    places = [statistics.fmean(at for at, _ in part) for part in parts]
    values = [statistics.fmean(value for _, value in part) for part in parts]
    gradient, start = statistics.linear_regression(places, values)
    spread = sum((at - statistics.fmean(places)) ** 2 for at in places)
    residue = sum((value - start - gradient * at) ** 2 for at, value in zip(places, values, strict=True))
    return gradient, T_975[blocks - 2] * math.sqrt(residue / (blocks - 2) / spread)
