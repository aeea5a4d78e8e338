"""Which steps may be cached: presets, bins and masks turned into a plan for N steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from ..config.settings import CacheSettings

MIN_SCHEDULE_STEPS = 8
"""Presets and bins are switched off below this number of steps (too few to leave any out)."""

PresetMask = Callable[[str, int], Sequence[int]]


class Action(Enum):
    """What a step does before anything was measured."""

    COMPUTE = "compute"
    CACHE = "cache"
    MEASURE = "measure"


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The decision for every step of one transformer, as far as it is known in advance.

    Args:
        num_steps: steps of this transformer in the request.
        warmup: steps computed before caching starts.
        mask: one entry a step, 1 computed and 0 may be cached; None without a schedule.
        static: mask entries of 0 are cached without measuring.
        max_cached: most cached steps, -1 for no limit.
        max_continuous: most cached steps in a row, -1 for no limit.
        computes: decides step by step instead of all of this: whether the step under way is computed.
    """

    num_steps: int
    warmup: frozenset[int] = frozenset()
    mask: tuple[int, ...] | None = None
    static: bool = False
    max_cached: int = -1
    max_continuous: int = -1
    computes: Callable[[], bool] | None = field(default=None, repr=False, compare=False)

    def action(self, step: int, cached: int = 0, continuous: int = 0) -> Action:
        """What step ``step`` does after ``cached`` cached steps, the last ``continuous`` in a row."""
        if self.computes is not None:
            return Action.COMPUTE if self.computes() else Action.CACHE
        if step in self.warmup or not 0 <= step < self.num_steps:
            return Action.COMPUTE
        if self.mask is not None:
            if self.mask[step]:
                return Action.COMPUTE
            if self.static:
                return Action.CACHE
        if 0 <= self.max_cached <= cached or 0 <= self.max_continuous <= continuous:
            return Action.COMPUTE
        return Action.MEASURE

    @property
    def may_cache(self) -> bool:
        """Whether any step can be cached at all. The first step never can: nothing precedes it."""
        if self.computes is not None:
            return True
        return any(self.action(step) is not Action.COMPUTE for step in range(1, self.num_steps))


def bins_mask(compute: Sequence[int], cache: Sequence[int], num_steps: int) -> tuple[int, ...]:
    """The mask of alternating computed and cached runs, cut to ``num_steps``.

    Raises:
        ValueError: the bins cover fewer steps.
    """
    mask: list[int] = []
    for index, run in enumerate(compute):
        mask += [1] * run
        if index < len(cache):
            mask += [0] * cache[index]
        if len(mask) >= num_steps:
            break
    if len(mask) < num_steps:
        raise ValueError(f"the bins cover {len(mask)} of {num_steps} steps")
    return tuple(mask[:num_steps])


def build_plan(
    settings: CacheSettings,
    num_steps: int,
    preset_mask: PresetMask,
    *,
    first_step: int = 0,
    total_steps: int | None = None,
) -> tuple[StepPlan, tuple[str, ...]]:
    """The plan for ``num_steps`` steps, and what could not be honoured, in words.

    Args:
        preset_mask: makes the mask of a preset for a number of steps.
        first_step: number of the transformer's first step within the request.
        total_steps: steps of the whole request; a mask list of that length is cut to this transformer.
    """
    mask, notes = _mask(settings, num_steps, preset_mask, first_step, total_steps)
    leading = num_steps if mask is None else next((i for i, step in enumerate(mask) if not step), num_steps)
    warmup = range(0, min(settings.max_warmup_steps, leading), settings.warmup_interval)
    plan = StepPlan(
        num_steps=num_steps,
        warmup=frozenset(warmup),
        mask=mask,
        static=mask is not None and settings.steps_computation_policy == "static",
        max_cached=settings.max_cached_steps,
        max_continuous=settings.max_continuous_cached_steps,
    )
    return plan, notes


def _mask(
    settings: CacheSettings, num_steps: int, preset_mask: PresetMask, first_step: int, total_steps: int | None
) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    wanted = settings.steps_computation_mask
    if isinstance(wanted, tuple):
        if len(wanted) == num_steps:
            return wanted, ()
        if len(wanted) == total_steps:
            return wanted[first_step : first_step + num_steps], ()
        return None, (f"schedule off: the mask has {len(wanted)} entries for {num_steps} steps",)
    if settings.scm_compute_bins is None and wanted is None:
        return None, ()
    if num_steps < MIN_SCHEDULE_STEPS:
        return None, (f"schedule off: {num_steps} steps, presets and bins need {MIN_SCHEDULE_STEPS}",)
    if settings.scm_compute_bins is None:
        return tuple(int(step) for step in preset_mask(str(wanted), num_steps)), ()
    try:
        return bins_mask(settings.scm_compute_bins, settings.scm_cache_bins or (), num_steps), ()
    except ValueError as error:
        return None, (f"schedule off: {error}",)
