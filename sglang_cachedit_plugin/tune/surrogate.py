"""Error of a schedule, foretold from the recorded trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..forecast import damped_weights
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
    """

    order: int = 1
    damping: float = 1.0
    fitted: int = 0

    @property
    def name(self) -> str:
        """For logs and reports."""
        if self.fitted:
            return f"fitted on {self.fitted} outputs"
        return f"order {self.order}" + (f", damping {self.damping:g}" if self.damping != 1.0 else "")


@dataclass(frozen=True)
class Forecast:
    """What a schedule is foretold to do.

    Args:
        decibels: PSNR of the final latents for each prompt.
        drift: relative to the peak after each step, the mean over prompts, (T,).
        weights: what the last computed outputs count on each cached step, oldest first.
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


def foretell(trajectories: Trajectories, mask: Mask, method: Method) -> Forecast:
    """Run a schedule on the recorded trajectories, in terms of their outputs."""
    t, gram, change = trajectories, trajectories.gram, trajectories.change
    prompts, steps = len(gram), t.steps
    drift = np.zeros((prompts, steps))
    known: list[tuple[int, np.ndarray]] = []
    weights, sizes = [], np.zeros((steps, prompts))
    for step in range(steps):
        if step in t.starts:
            known.clear()
        if mask[step] or step in t.starts:
            output = t.gain[step] * drift
            output[:, step] += 1.0
            known.append((step, output))
        else:
            used = known[-(method.fitted or method.order + 1) :]
            row = _weights(t, step, used, drift, method)
            weights.append(tuple(float(each) for each in row))
            output = np.einsum("m,mbt->bt", row, np.stack([each for _, each in used]))
        drift = drift + change[step] * output
        drift[:, step] -= change[step]
        sizes[step] = np.einsum("bt,btu,bu->b", drift, gram, drift)
    error = np.maximum(sizes[-1], 0.0) / t.peak**2
    decibels = -10.0 * np.log10(error + FLOOR)
    return Forecast(decibels, np.sqrt(np.maximum(sizes, 0.0) / t.peak**2).mean(1), tuple(weights))


def spread(t: Trajectories, mask: Mask, method: Method) -> np.ndarray:
    """The largest relative error of the extrapolation at each step over the prompts, (T,); 0 where nothing is known."""
    found, known = np.zeros(t.steps), []
    for step in range(t.steps):
        if step in t.starts:
            known = []
        elif known:
            used = known[-(method.order + 1) :]
            places = [float(t.timesteps[at]) for at in used]
            off = np.zeros(t.steps)
            off[used] = damped_weights(places, float(t.timesteps[step]), method.damping)
            off[step] -= 1.0
            sizes = np.maximum(np.einsum("t,btu,u->b", off, t.gram, off), 0.0) / t.gram[:, step, step]
            found[step] = np.sqrt(sizes.max())
        if mask[step]:
            known.append(step)
    return found


def _weights(
    t: Trajectories, step: int, used: list[tuple[int, np.ndarray]], drift: np.ndarray, method: Method
) -> np.ndarray:
    if not method.fitted:
        places = [float(t.timesteps[at]) for at, _ in used]
        return np.array(damped_weights(places, float(t.timesteps[step]), method.damping))
    # The weights that bring the latents nearest to where they belong after this step, over all prompts:
    # the forecast makes up for the drift so far, as a corrector does.
    outputs = np.stack([each for _, each in used])
    wanted = -drift / t.change[step]
    wanted[:, step] += 1.0
    scale = 1.0 / t.peak**2
    left = np.einsum("mbt,btu->mbu", outputs, t.gram)
    products = np.einsum("mbu,nbu,b->mn", left, outputs, scale)
    right = np.einsum("mbu,bu,b->m", left, wanted, scale)
    hold = np.zeros(len(used))
    hold[-1] = 1.0
    ridge = RIDGE * np.trace(products) / len(used)
    return np.linalg.solve(products + ridge * np.eye(len(used)), right + ridge * hold)
