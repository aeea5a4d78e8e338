"""Error of a schedule, predicted from the recorded trajectories.

The corrector is linear too: it repeats the cached steps with the polynomial through the computed outputs on both
sides, so that a corrected trajectory is a combination of the recorded outputs as any other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cache.forecast import damped_weights
from .trajectory import Trajectories

RIDGE = 1e-3
FLOOR = 1e-7
"""Error under which nothing is gained, in squared peaks: 70 dB."""
WORST = 0.25
"""What the worst prompt counts in the score, next to the mean."""

Mask = tuple[int, ...]


@dataclass(frozen=True)
class Method:
    """How cached steps are forecast.

    Args:
        order: degree of the extrapolation.
        damping: what its terms count.
        fitted: of so many last outputs, with weights fitted to the trajectories; 0: by the extrapolation.
        corrector: degree of the polynomial that corrects cached steps, 0: they stay as they are.
        carry: ``corrector_carry``.
    """

    order: int = 1
    damping: float = 1.0
    fitted: int = 0
    corrector: int = 0
    carry: float = 0.5

    @property
    def name(self) -> str:
        """For logs and reports."""
        name = f"fitted on {self.fitted} outputs" if self.fitted else f"order {self.order}"
        if self.damping != 1.0 and not self.fitted:
            name += f", damping {self.damping:g}"
        return name + (f", corrector {self.corrector}, carry {self.carry:g}" if self.corrector else "")

    @property
    def settings(self) -> dict[str, Any]:
        """The corrector as settings; named, it does not step aside by itself."""
        if not self.corrector:
            return {"corrector": False}
        return {"corrector": True, "corrector_order": self.corrector, "corrector_carry": self.carry}


@dataclass(frozen=True)
class Forecast:
    """What a schedule is predicted to do.

    Args:
        decibels: PSNR of the final latents for each prompt.
        drift: relative to the peak after each step, the mean over prompts, (T,).
        weights: what the last computed outputs count on each cached step, oldest first; of one mask for all
            branches.
    """

    decibels: np.ndarray
    drift: np.ndarray
    weights: tuple[tuple[float, ...], ...]

    @property
    def score(self) -> float:
        """Mean PSNR, with the worst prompt counted extra."""
        return score(self.decibels)


def score(decibels: Sequence[float] | np.ndarray) -> float:
    """Mean PSNR in dB moved towards the worst by ``WORST``."""
    values = np.asarray(decibels, dtype=np.float64)
    return float((1 - WORST) * values.mean() + WORST * values.min())


def by_branch(mask: Mask, steps: int) -> list[Mask]:
    """The masks of the branches, one after the other in ``mask``; one for all where it has one entry a step."""
    return [mask[first : first + steps] for first in range(0, len(mask), steps)]


def predict(t: Trajectories, mask: Mask, method: Method) -> Forecast:
    """Run a schedule on the recorded trajectories, in terms of their outputs.

    Args:
        mask: one entry a step, or one after the other those of each branch; with masks of their own nothing is
            corrected.
    """
    masks = by_branch(mask, t.steps)
    whole = t.vectors.sum(0)
    branches, shares = ([whole], [1.0]) if len(masks) == 1 else (list(t.vectors), list(t.parts))
    drift = np.zeros(whole.shape[1])
    known: list[list[tuple[float, np.ndarray]]] = [[] for _ in masks]
    weights, drifts = [], np.zeros_like(whole)
    pending: list[int] = []
    before = drift
    for step in range(t.steps):
        added = -whole[step]
        for own, outputs, share, history in zip(masks, branches, shares, known, strict=True):
            if step in t.starts:
                history.clear()
                pending = []
            if own[step] or step in t.starts:
                output = outputs[step] + (share * t.gain[step]) * drift
                history.append((float(t.timesteps[step]), output))
            else:
                used = history[-(method.fitted or method.order + 1) :]
                row = _weights(t, step, used, drift, method)
                weights.append(tuple(row))
                output = sum(weight * each for weight, (_, each) in zip(row, used, strict=True))
            added = added + output
        if method.corrector and len(masks) == 1:
            if not masks[0][step] and step not in t.starts:
                before = before if pending else drift
                pending.append(step)
            elif pending:
                corrected = _corrected(t, pending, before, known[0][-(method.corrector + 1) :])
                added = added + (method.carry / t.left[step]) * (corrected - drift)
                drift, pending = corrected, []
        drift = drift + t.change[step] * added
        drifts[step] = drift
    sizes = np.square(drifts.reshape(t.steps, len(t.gram), -1)).sum(2)
    return Forecast(-10.0 * np.log10(sizes[-1] + FLOOR), np.sqrt(sizes).mean(1), tuple(weights))


def _corrected(
    t: Trajectories, pending: Sequence[int], drift: np.ndarray, used: Sequence[tuple[float, np.ndarray]]
) -> np.ndarray:
    """The drift after ``pending`` steps that are repeated from ``drift`` on, with the polynomial through ``used``."""
    places = tuple(place for place, _ in used)
    for step in pending:
        row = _extrapolation(places, float(t.timesteps[step]), 1.0)
        output = sum(weight * each for weight, (_, each) in zip(row, used, strict=True))
        drift = drift + t.change[step] * (output - t.vectors[:, step].sum(0))
    return drift


def _weights(
    t: Trajectories, step: int, used: list[tuple[float, np.ndarray]], drift: np.ndarray, method: Method
) -> Sequence[float]:
    if not method.fitted:
        return _extrapolation(tuple(place for place, _ in used), float(t.timesteps[step]), method.damping)
    # The weights that bring the latents nearest to where they belong after this step, over all prompts:
    # the forecast makes up for the drift so far, as a corrector does.
    outputs = np.stack([each for _, each in used])
    wanted = t.vectors[:, step].sum(0) - drift / t.change[step]
    products = outputs @ outputs.T
    hold = np.zeros(len(used))
    hold[-1] = 1.0
    ridge = RIDGE * np.trace(products) / len(used)
    return np.linalg.solve(products + ridge * np.eye(len(used)), outputs @ wanted + ridge * hold).tolist()


@functools.lru_cache(maxsize=1 << 16)
def _extrapolation(places: tuple[float, ...], at: float, damping: float) -> tuple[float, ...]:
    return tuple(damped_weights(places, at, damping))
