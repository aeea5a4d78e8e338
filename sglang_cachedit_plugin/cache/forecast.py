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


def damped_weights(positions: Sequence[float], at: float, damping: float = 1.0) -> list[float]:
    """The same with the polynomial's term of order i counting ``damping ** i``; the last position is the nearest.

    1 is the whole polynomial, 0 the last value. The terms are those of Newton's form, built from the nearest
    position backwards, so that damping never changes what a constant gives.
    """
    if damping == 1.0 or len(positions) < 2:
        return lagrange_weights(positions, at)
    weights = [0.0] * len(positions)
    lower = [0.0] * len(positions)
    for order in range(len(positions)):
        first = len(positions) - 1 - order
        through = [0.0] * first + lagrange_weights(positions[first:], at)
        weights = [w + damping**order * (new - old) for w, new, old in zip(weights, through, lower, strict=True)]
        lower = through
    return weights


class Extrapolator:
    """Remembers the last computed values of one tensor and forecasts the next.

    Args:
        order: degree of the polynomial once enough values are known; 0 repeats the last value.
        damping: see ``damped_weights``.
        depth: values remembered for weights given from outside, if more than the polynomial's.
    """

    def __init__(self, order: int, damping: float = 1.0, depth: int = 0):
        self.order, self.damping = order, damping
        self._depth = max(order + 1, depth)
        self._known: deque[tuple[float, torch.Tensor]] = deque(maxlen=self._depth)

    def __len__(self) -> int:
        return len(self._known)

    @property
    def latest(self) -> torch.Tensor:
        return self._known[-1][1]

    def update(self, position: float, value: torch.Tensor, step: int = 0) -> None:
        """Add a computed value; a value of another shape starts anew, one at a known position replaces it.

        Args:
            step: not used, nor in ``predict``: the polynomial is one over positions.
        """
        if self._known and self.latest.shape != value.shape:
            self._known.clear()
        others = [known for known in self._known if known[0] != position]
        self._known = deque([*others, (position, value)], maxlen=self._depth)

    def predict(
        self, position: float, weights: Sequence[float] | None = None, *, order: int | None = None, step: int = 0
    ) -> torch.Tensor:
        """The forecast at ``position``, accumulated in float32, in the dtype of the values.

        Args:
            weights: what the last values count, oldest first, instead of the polynomial's; of more weights
                than values known nothing is used.
            order: another degree of the polynomial.
        """
        if weights is None or len(weights) > len(self._known):
            known = list(self._known)[-((self.order if order is None else order) + 1) :]
            weights = damped_weights([at for at, _ in known], position, self.damping)
        latest = self.latest
        if list(weights) == [1.0]:
            return latest
        total = torch.zeros_like(latest, dtype=torch.float32)
        for weight, (_, value) in zip(weights, list(self._known)[-len(weights) :], strict=True):
            total.add_(value, alpha=weight)
        return total.to(latest.dtype)

    def evict_oldest(self) -> None:
        """Drop the value that the next one will push out."""
        if len(self._known) == self._depth:
            self._known.popleft()

    def clear(self) -> None:
        self._known.clear()

    def held_bytes(self) -> int:
        return sum(value.nbytes for _, value in self._known)
