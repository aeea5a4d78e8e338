"""How often a quality is missed on prompts that nobody has seen, bounded from those of a calibration set.

Tolerances are tested from the smallest on, each with the exact binomial test on the same prompts, and the first that
fails ends it: the one before holds the promise with the stated confidence, whatever the scores' distribution and
whether or not they fall with the tolerance (fixed-sequence testing, Learn then Test, arXiv 2110.01052). The prompts
must be drawn as those to come are, and nothing may have been chosen on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TOLERANCES = (0.001, 0.0015, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12)
"""Values of ``error_tolerance`` that are tried."""


@dataclass(frozen=True)
class Promise:
    """``share`` of unseen prompts reach the quality, said with ``confidence``."""

    share: float
    confidence: float

    @property
    def needed(self) -> int:
        """Fewest calibration prompts with which it can be shown, if none of them misses."""
        return math.ceil(math.log(1.0 - self.confidence) / math.log(self.share) - 1e-9)

    def allowed(self, count: int) -> int:
        """Most of ``count`` calibration prompts that may miss; -1 where there are too few of them."""
        missing = -1
        while tail(missing + 1, count, 1.0 - self.share) <= 1.0 - self.confidence:
            missing += 1
        return missing

    def bound(self, missing: int, count: int) -> float:
        """Upper confidence bound (Clopper, Pearson 1934) on the part of unseen prompts that miss."""
        low, high = missing / count, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if tail(missing, count, middle) > 1.0 - self.confidence else (low, middle)
        return high


def tail(missing: int, count: int, rate: float) -> float:
    """Probability of at most ``missing`` among ``count`` that miss independently at ``rate``."""
    return sum(math.comb(count, k) * rate**k * (1.0 - rate) ** (count - k) for k in range(min(missing, count) + 1))


def largest(
    values: Sequence[float], missing: Callable[[float, int], int], count: int, promise: Promise
) -> tuple[float, int] | None:
    """The last value before the first for which the promise cannot be shown, and how many prompts miss at it.

    Args:
        values: from the safest on, chosen before anything was measured.
        missing: how many of the ``count`` prompts miss at a value; it may stop counting above its second argument.
    """
    allowed, found = promise.allowed(count), None
    for value in values:
        missed = missing(value, allowed)
        if missed > allowed:
            break
        found = value, missed
    return found
