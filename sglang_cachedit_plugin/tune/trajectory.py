"""What the search knows of the uncached trajectories: spacing and inner products of their outputs.

Everything is kept as inner products over the latents, so that the error of any schedule is a small quadratic form
and thousands can be tried in seconds. With outputs v_k at steps k and the scheduler's change ``dt_k v_k``, the
drift d of a schedule from the uncached trajectory obeys ``d_{k+1} = d_k + dt_k (o_k - v_k)``, where o_k is the
forecast on a cached step and ``v_k + gain_k d_k`` on a computed one. The gain is how the model answers drift: a
denoiser that finds the same picture again takes drift off in proportion to the way left, one that has begun another
picture does not. Nobody knows which before trying, so the search makes schedules for several gains and runs them.
All o_k and d_k are combinations of the recorded v_k. Where each step runs a conditional and an unconditional branch,
v_k is the sum of both, each times what guidance makes of it, and either may be left out alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Trajectories:
    """Uncached trajectories of several prompts.

    Args:
        timesteps: falling places of the steps, (T,).
        change: what an output counts in the latents' change, (T,).
        gram: mean products of the outputs over the latents, (prompts, B T, B T): of all steps of the first branch,
            then of the second, each times its part in the velocity.
        peak: range of the final latents, (prompts,).
        recall: how far the model finds back to its picture, from 0 (drift stays) to 1 (it vanishes to the end).
        starts: first steps of the transformers; they are computed, and nothing before them is extrapolated.
        parts: what each branch counts in the velocity, (B,).
    """

    timesteps: np.ndarray
    change: np.ndarray
    gram: np.ndarray
    peak: np.ndarray
    recall: float = 0.0
    starts: frozenset[int] = frozenset({0})
    parts: tuple[float, ...] = (1.0,)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.timesteps)

    @functools.cached_property
    def vectors(self) -> np.ndarray:
        """Vectors with the outputs' products over all prompts, in units of the peak, (B, T, N).

        Prompt after prompt in N, so that sums over all prompts are plain products of vectors.
        """
        values, axes = np.linalg.eigh(self.gram)
        roots = axes * np.sqrt(np.maximum(values, 0.0))[:, None, :] / self.peak[:, None, None]
        return roots.transpose(1, 0, 2).reshape(len(self.parts), self.steps, -1)

    @functools.cached_property
    def left(self) -> np.ndarray:
        """The way to the end before each step, (T,); above 0 where the change is that of a falling sigma."""
        left = -np.cumsum(self.change[::-1])[::-1]
        return np.where(left == 0.0, np.inf, left)

    @functools.cached_property
    def gain(self) -> np.ndarray:
        """The output's answer to drift on each step, (T,)."""
        return self.recall / self.left


def combine(
    outputs: Mapping[str, np.ndarray], inputs: np.ndarray, final: np.ndarray, timesteps: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """The branches' parts of the velocity on each step, and what it counts.

    The scheduler's change of the latents is regressed on the branches' outputs; with guidance the mixture is the
    same on every step. Where the latents that go in have another shape than the outputs, the first branch stands
    for all and the change is that of the timesteps.

    Args:
        outputs: by branch, (T, N); a branch that was not run on some step is left out by the caller.
        inputs: latents before each step, (T, N), or of another width.
        final: latents at the end, (N,).

    Returns:
        parts of the velocity (B, T, N), change (T,), and what each branch counts (B,). Only ``cond`` and ``uncond``
        are kept apart, as a schedule has masks for these two; any others are one part, their mixture.
    """
    sigma = timesteps / max(timesteps.max(), 1e-9)
    spacing = np.append(sigma[1:], 0.0) - sigma
    values = np.stack(list(outputs.values()))
    if inputs.shape != values[0].shape or final.size != values.shape[2]:
        return values[:1], spacing, (1.0,)
    moved = np.diff(np.concatenate([inputs, final.reshape(1, -1)]), axis=0)
    stacked = values * spacing[:, None]
    matrix = np.einsum("atn,btn->ab", stacked, stacked)
    mixture = np.linalg.lstsq(matrix, np.einsum("atn,tn->a", stacked, moved), rcond=1e-6)[0]
    mixed = mixture[:, None, None] * values
    if set(outputs) != {"cond", "uncond"}:
        return mixed.sum(0, keepdims=True), spacing, (1.0,)
    return mixed, spacing, tuple(float(each) for each in mixture)


def products(velocity: np.ndarray) -> np.ndarray:
    """Mean products over the latents of each two, (..., N) -> (M, M)."""
    values = velocity.reshape(-1, velocity.shape[-1]).astype(np.float64)
    return values @ values.T / values.shape[1]
