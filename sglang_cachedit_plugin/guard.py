"""Online safety of a static schedule: does the forecast still hold as it did when the schedule was tuned?

At each computed step the output is at hand beside what would have been forecast. Their relative difference, over
the largest that tuning prompts showed at that step, is 1 or less for a request like them. What exceeds 1 adds up
until a computed step is within again; while the sum exceeds the limit, steps that the schedule would forecast are
computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

LEAST = 1e-3
"""Relative difference that every request may have: rounding."""


def relative_error(forecast: Any, output: Any, group: dist.ProcessGroup | None = None) -> float:
    """Relative L2 difference of two outputs of one structure over the ranks that share them; one read by the host.

    Infinite where it is not a number.
    """
    pairs = zip(pytree.tree_leaves(forecast), pytree.tree_leaves(output), strict=True)
    sums = [
        torch.stack([(b.float() - a.float()).square().sum(), b.float().square().sum()])
        for a, b in pairs if isinstance(b, torch.Tensor)
    ]
    total = torch.stack(sums).sum(0)
    if group is not None:
        dist.all_reduce(total, group=group)
    difference, size = total.tolist()
    value = math.sqrt(difference / size) if size > 0.0 and difference >= 0.0 else math.inf
    return value if math.isfinite(value) else math.inf


class ForecastGuard:
    """One branch of one request.

    Args:
        limit: sum of the excess over what tuning saw at which steps are computed again.
        spread: for each of the host's steps the largest relative error on tuning prompts.
    """

    def __init__(self, limit: float, spread: Sequence[float]):
        self._limit, self._spread = limit, spread
        self._excess = 0.0
        self.worst = 0.0
        self.recomputed: list[int] = []

    def saw(self, step: int, error: float) -> None:
        """The forecast's relative error at a computed step."""
        ratio = error / max(self._spread[step], LEAST)
        self.worst = max(self.worst, ratio)
        self._excess = self._excess + ratio - 1.0 if ratio > 1.0 else 0.0

    def recompute(self, step: int) -> bool:
        """Whether a step that the schedule would forecast must be computed."""
        if self._excess <= self._limit:
            return False
        self.recomputed.append(step)
        return True

    def note(self, branch: str) -> str:
        """For the report."""
        return (
            f"{branch}: {len(self.recomputed)} steps computed beyond the schedule, the forecast was up to "
            f"{self.worst:.1f} times as wrong as on tuning prompts"
        )
