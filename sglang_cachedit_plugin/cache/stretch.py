"""The part of a schedule that one run of the denoising loop takes.

Image-to-image with a strength below 1 begins in the middle of the scheduler's timesteps; some loops end before the
last. A mask list and a tuned schedule are written for the whole: the run takes their part at its own timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config.tuned_schedules import TunedSchedule


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Steps of a run within its schedule; a step is one evaluation of the model and one step of the scheduler.

    Args:
        timesteps: of the whole schedule, one for each step. Schedulers of second order (Heun, DPM2) have two for
            each but the last of the steps asked for.
        first: index of the run's first step.
        count: steps of the run.
        asked: denoising steps that the request asked for.
        order: steps of the scheduler for each one asked for.
    """

    timesteps: tuple[float, ...]
    first: int
    count: int
    asked: int
    order: int = 1

    @property
    def positions(self) -> tuple[float, ...]:
        return self.timesteps[self._part]

    @property
    def _part(self) -> slice:
        return slice(self.first, self.first + self.count)

    def mask(self, mask: Sequence[int]) -> tuple[int, ...]:
        """The run's part of a mask list for the steps asked for or for the whole schedule; others as they are."""
        whole = len(self.timesteps)
        if len(mask) == self.asked:
            # One entry holds for both evaluations of a step.
            mask = [mask[min(step // self.order, self.asked - 1)] for step in range(whole)]
        if len(mask) == self.count or len(mask) != whole:
            return tuple(mask)
        return self._of_run(mask)

    def row(self, row: TunedSchedule) -> TunedSchedule:
        """The run's part of a tuned schedule for the whole."""
        if self.count == row.steps:
            return row
        weights = None
        if row.weights is not None:
            cached = [step for step, computed in enumerate(row.mask) if not computed]
            of_step = dict(zip(cached, row.weights, strict=True))
            mask = self._of_run(row.mask)
            weights = tuple(
                self._weights(row.mask, self.first + step, of_step[self.first + step])
                for step, computed in enumerate(mask) if not computed
            )
        return replace(
            row, steps=self.count, mask=self._of_run(row.mask), weights=weights,
            uncond_mask=row.uncond_mask and self._of_run(row.uncond_mask),
            timesteps=row.timesteps and row.timesteps[self._part],
        )

    def _of_run(self, mask: Sequence[int]) -> tuple[int, ...]:
        """The first step of a run is computed: there is nothing that it could be made of."""
        return (1, *mask[self._part][1:])

    def _weights(self, mask: Sequence[int], step: int, weights: tuple[float, ...]) -> tuple[float, ...]:
        """The weights of a cached step; none where they count outputs from before the run began."""
        return weights if len(weights) <= sum(mask[self.first : step]) else ()
