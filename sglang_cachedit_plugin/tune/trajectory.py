"""What the search knows of the uncached trajectories: spacing and inner products of their outputs.

Everything is kept as inner products over the latents, so that the error of any schedule is a small quadratic form
and thousands can be tried in seconds. With outputs v_k at steps k and the scheduler's change ``dt_k v_k``, the
drift d of a schedule from the uncached trajectory obeys ``d_{k+1} = d_k + dt_k (o_k - v_k)``, where o_k is the
forecast on a cached step and ``v_k + gain_k d_k`` on a computed one. The gain is how the model answers drift: a
denoiser that finds the same picture again takes drift off in proportion to the way left, one that has begun another
picture does not. Nobody knows which before trying, so the search makes schedules for several gains and runs them.
All o_k and d_k are combinations of the recorded v_k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Trajectories:
    """Uncached trajectories of several prompts.

    Args:
        timesteps: falling places of the steps, (T,).
        change: what an output counts in the latents' change, (T,).
        gram: mean products of the outputs over the latents, (prompts, T, T).
        peak: range of the final latents, (prompts,).
        recall: how far the model finds back to its picture, from 0 (drift stays) to 1 (it vanishes to the end).
        starts: first steps of the transformers; they are computed, and nothing before them is extrapolated.
    """

    timesteps: np.ndarray
    change: np.ndarray
    gram: np.ndarray
    peak: np.ndarray
    recall: float = 0.0
    starts: frozenset[int] = frozenset({0})

    @property
    def steps(self) -> int:
        """T."""
        return len(self.timesteps)

    @property
    def gain(self) -> np.ndarray:
        """The output's answer to drift on each step, (T,)."""
        left = np.cumsum(self.change[::-1])[::-1]
        return -self.recall / np.where(left == 0.0, np.inf, left)


def combine(
    outputs: Mapping[str, np.ndarray], inputs: np.ndarray, final: np.ndarray, timesteps: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One velocity for each step out of the branches' outputs, and what it counts.

    The scheduler's change of the latents is regressed on the branches' outputs; with guidance the mixture is the
    same on every step. Where the latents that go in have another shape than the outputs, the first branch stands
    for all and the change is that of the timesteps.

    Args:
        outputs: by branch, (T, N); a branch that was not run on some step is left out by the caller.
        inputs: latents before each step, (T, N), or of another width.
        final: latents at the end, (N,).

    Returns:
        velocity (T, N) and change (T,).
    """
    sigma = timesteps / max(timesteps.max(), 1e-9)
    spacing = np.append(sigma[1:], 0.0) - sigma
    first = next(iter(outputs.values()))
    if inputs.shape != first.shape or final.size != first.shape[1]:
        return first, spacing
    moved = np.diff(np.concatenate([inputs, final.reshape(1, -1)]), axis=0)
    stacked = np.stack([value * spacing[:, None] for value in outputs.values()])
    matrix = np.einsum("atn,btn->ab", stacked, stacked)
    mixture = np.linalg.lstsq(matrix, np.einsum("atn,tn->a", stacked, moved), rcond=1e-6)[0]
    return np.einsum("a,atn->tn", mixture, np.stack(list(outputs.values()))), spacing


def products(velocity: np.ndarray) -> np.ndarray:
    """Mean products over the latents of each two steps, (T, N) -> (T, T)."""
    values = velocity.astype(np.float64)
    return values @ values.T / values.shape[1]
