"""Dynamic mode decomposition of computed steps, kept small.

A DMD forecast (Schmid 2010; cache-dit's ``DMDCalibrator``) is a sum of damped oscillations fitted to the last
computed values. Every mode is a combination of those values, so the forecast is one too: the decomposition
needs their inner products only, an ``n x n`` matrix for ``n`` values, and no factor as large as the values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .forecast import Extrapolator

MIN_VALUES = 4
"""Values that a fit needs: one oscillating mode takes two real degrees of freedom and three pairs."""

_AUTO_CUT = 1e-4
_CHUNK = 1 << 20


def gram(values: Sequence[torch.Tensor], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Inner products of ``values`` for each batch item.

    Args:
        values: ``n`` tensors of one shape: (batch, tokens, dim), or (tokens, dim) of one packed item.
        dtype: precision of the sums; the values are converted a chunk at a time.

    Returns:
        float64 tensor on the CPU, (batch, n, n).
    """
    rows = [_items(value).flatten(1) for value in values]
    batch, size = rows[0].shape
    sums = torch.zeros(batch, len(rows), len(rows), dtype=dtype, device=rows[0].device)
    for start in range(0, size, _CHUNK):
        part = torch.stack([row[:, start : start + _CHUNK] for row in rows], dim=1).to(dtype)
        sums += part @ part.mT
    return sums.double().cpu()


def _items(value: torch.Tensor) -> torch.Tensor:
    """``value`` with a batch dimension; tokens of a packed tensor belong to one item."""
    return value if value.dim() > 2 else value[None]


class DMDFit:
    """Modes of a uniformly spaced series, in terms of its inner products.

    Args:
        products: inner products of the ``n`` values, oldest first, (n, n) float64.
        rank: modes kept; 0 keeps those above 1e-4 of the largest singular value.
        ridge: added to the singular values before they are inverted.
    """

    def __init__(self, products: torch.Tensor, rank: int, ridge: float):
        before, cross, after = products[:-1, :-1], products[:-1, 1:], products[1:, 1:]
        squares, vectors = torch.linalg.eigh(before)
        singular = squares.clamp(min=0.0).sqrt().flip(0)
        vectors = vectors.flip(1)
        kept = int((singular > singular[0] * (_AUTO_CUT if rank <= 0 else 1e-8)).sum())
        kept = max(1, min(kept, rank) if rank > 0 else kept)
        singular, vectors = singular[:kept], vectors[:, :kept]
        inverse = 1.0 / (singular + ridge)
        step = (vectors.mT @ cross @ vectors) / singular.clamp(min=1e-300)[:, None] * inverse
        self._eigenvalues, modes = torch.linalg.eig(step)
        self._modes = (vectors * inverse).to(modes.dtype) @ modes
        self._amplitudes = self._fit(after)

    def _fit(self, after: torch.Tensor) -> torch.Tensor:
        """Amplitudes with which the modes give the newest value, by least squares."""
        squares, vectors = torch.linalg.eigh(after)
        root = (squares.clamp(min=0.0).sqrt()[:, None] * vectors.mT).to(self._modes.dtype)
        solution: torch.Tensor = torch.linalg.lstsq(root @ self._modes, root[:, -1:], driver="gelsd").solution
        return solution[:, 0]

    def weights(self, horizon: float) -> list[float] | None:
        """Weights of the values without the oldest, ``horizon`` spacings after the newest; None if not finite."""
        powers = self._eigenvalues.pow(horizon) * self._amplitudes
        weights = (self._modes @ powers).real
        return weights.tolist() if bool(weights.isfinite().all()) else None


class DMDForecaster:
    """Remembers the last computed values of one tensor and forecasts by their modes.

    Fewer than four values at one spacing are extrapolated by a line on the real spacing instead, as cache-dit does by
    step number.

    Args:
        history: values kept.
        rank, ridge: see DMDFit.
        single: inner products in float32 instead of float64.
    """

    def __init__(self, history: int, rank: int = 0, ridge: float = 1e-8, single: bool = False):
        self._history, self._rank, self._ridge = history, rank, ridge
        self._dtype = torch.float32 if single else torch.float64
        self._known: list[tuple[int, float, torch.Tensor]] = []
        self._fits: list[DMDFit | None] | None = None

    def __len__(self) -> int:
        return len(self._known)

    @property
    def latest(self) -> torch.Tensor:
        return self._known[-1][2]

    def update(self, position: float, value: torch.Tensor, step: int) -> None:
        """Add the value computed at ``step``; a value of another shape starts anew."""
        if self._known and self.latest.shape != value.shape:
            self._known.clear()
        self._known = [*(k for k in self._known if k[0] != step), (step, position, value)][-self._history :]
        self._fits = None

    def evict_oldest(self) -> None:
        del self._known[: max(0, len(self._known) - self._history + 1)]
        self._fits = None

    def held_bytes(self) -> int:
        return sum(value.nbytes for _, _, value in self._known)

    def predict(self, position: float, *, step: int) -> torch.Tensor:
        """The forecast at ``step``, in the dtype of the values."""
        tail = self._uniform_tail()
        if len(tail) < MIN_VALUES:
            line = Extrapolator(1)
            for _, known, value in self._known[-2:]:
                line.update(known, value)
            return line.predict(position)
        series = [_items(value) for _, _, value in tail]
        if self._fits is None:
            self._fits = [self._fit(each) for each in gram(series, self._dtype)]
        horizon = (step - tail[-1][0]) / (tail[-1][0] - tail[-2][0])
        forecast = series[-1].clone()
        for index, fit in enumerate(self._fits):
            weights = fit.weights(horizon) if fit is not None else None
            if weights is not None:
                total = torch.zeros_like(forecast[index], dtype=torch.float32)
                for weight, value in zip(weights, series[1:], strict=True):
                    total.add_(value[index], alpha=weight)
                forecast[index] = total
        return forecast.reshape(self.latest.shape)

    def _fit(self, products: torch.Tensor) -> DMDFit | None:
        """A fit, None where the values allow none: then the newest value is repeated."""
        if not math.isfinite(float(products.sum())):
            return None
        try:
            return DMDFit(products, self._rank, self._ridge)
        except RuntimeError:
            return None

    def _uniform_tail(self) -> list[tuple[int, float, torch.Tensor]]:
        """The longest run of latest values at one spacing."""
        tail = self._known[-2:]
        for known in reversed(self._known[:-2]):
            if tail[0][0] - known[0] != tail[-1][0] - tail[-2][0]:
                break
            tail.insert(0, known)
        return tail
