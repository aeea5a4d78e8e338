"""Extrapolation over computed steps on their real spacing.

Through the last ``order + 1`` computed values a polynomial in the step's position (timestep, sigma or
step number) is laid and evaluated at the cached step. On equal spacing this is the Taylor expansion by
finite differences of TaylorSeer (arXiv 2503.06923); on the model output of a flow-matching model it is
the predictor of an Adams-Bashforth method.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch


def lagrange_weights(positions: Sequence[float], at: float) -> list[float]:
    """Weights of values at ``positions`` in the polynomial through them, evaluated at ``at``."""
    weights = []
    for i, own in enumerate(positions):
        weight = 1.0
        for j, other in enumerate(positions):
            if i != j:
                weight *= (at - other) / (own - other)
        weights.append(weight)
    return weights


class Extrapolator:
    """Remembers the last computed values of one tensor and forecasts the next.

    Args:
        order: degree of the polynomial once enough values are known; 0 repeats the last value.
    """

    def __init__(self, order: int):
        self.order = order
        self._known: deque[tuple[float, torch.Tensor]] = deque(maxlen=order + 1)

    def __len__(self) -> int:
        return len(self._known)

    @property
    def shape(self) -> torch.Size | None:
        """Shape of the values, None before the first."""
        return self._known[-1][1].shape if self._known else None

    def update(self, position: float, value: torch.Tensor) -> None:
        """Add a computed value; a value of another shape starts anew, one at a known position replaces it."""
        if self._known and self.shape != value.shape:
            self._known.clear()
        others = [known for known in self._known if known[0] != position]
        self._known = deque([*others, (position, value)], maxlen=self.order + 1)

    def predict(self, position: float) -> torch.Tensor:
        """The forecast at ``position``, accumulated in float32, in the dtype of the values."""
        positions = [known for known, _ in self._known]
        weights = lagrange_weights(positions, position)
        latest = self._known[-1][1]
        if len(weights) == 1:
            return latest
        total = latest.float() * weights[-1]
        for weight, (_, value) in zip(weights[:-1], list(self._known)[:-1], strict=True):
            total = total.add_(value.float(), alpha=weight)
        return total.to(latest.dtype)

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()

    def held_bytes(self) -> int:
        """Bytes of the values kept."""
        return sum(value.numel() * value.element_size() for _, value in self._known)
