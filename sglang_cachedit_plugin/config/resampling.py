"""Which tuned schedule serves a request, and what becomes of it at steps or a size that were not tuned.

The rule: a row of the request's own steps and size is taken as it is. Otherwise the row nearest in the number of
steps, then in the number of pixels, is resampled: its share of computed steps is kept, and they are placed so
that they have the same distribution over the timesteps (or sigmas), where both are known, else over the
normalised step number. Fitted weights belong to their timesteps and are left out; order and damping stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from .tuned_schedules import TunedSchedule, describe

TOLERANCE = 0.005
"""Timesteps count as the tuned ones up to this part of their range."""


def choose(
    rows: Sequence[TunedSchedule], steps: int, size: tuple[int, ...] | None, timesteps: Sequence[float] | None
) -> tuple[TunedSchedule, str | None]:
    """The schedule of a request, and how it was come by where it was not tuned for it.

    Args:
        steps: denoising steps of the request.
        size: width and height, and frames of a video, None where unknown.
        timesteps: the request's timesteps or sigmas, None where not yet known.
    """
    row = min(rows, key=lambda row: _distance(row, steps, size))
    fits = row.steps == steps and (row.size is None or size is None or row.size == size)
    if fits and _same_path(row.timesteps, timesteps):
        return row, None
    known = row.timesteps is not None and timesteps is not None and len(timesteps) == steps
    places = None if not known else list(timesteps)
    mask = resample(row.mask, steps, row.timesteps if known else None, places)
    uncond = row.uncond_mask and resample(row.uncond_mask, steps, row.timesteps if known else None, places)
    over = "timesteps" if known else "the step number"
    note = (
        f"no schedule was tuned for {describe(steps, size)}{' with these timesteps' if fits else ''}: the one for "
        f"{row.label()} is resampled over {over}, {sum(mask)} steps computed"
    )
    return replace(
        row, steps=steps, size=size, mask=mask, uncond_mask=uncond, weights=None, timesteps=None
    ), note


def _distance(row: TunedSchedule, steps: int, size: tuple[int, ...] | None) -> tuple[float, float, int]:
    of_steps = abs(math.log(row.steps / steps))
    if row.size is None or size is None:
        return of_steps, 0.0, row.steps
    return of_steps, abs(math.log(math.prod(row.size) / math.prod(size))), row.steps


def _same_path(tuned: Sequence[float] | None, asked: Sequence[float] | None) -> bool:
    if tuned is None or asked is None or len(tuned) != len(asked):
        return True
    limit = TOLERANCE * (max(tuned) - min(tuned))
    return all(abs(one - other) <= limit for one, other in zip(tuned, asked, strict=True))


def resample(
    mask: Sequence[int],
    steps: int,
    places: Sequence[float] | None = None,
    new_places: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """``mask`` for another number of steps, with the same share and distribution of computed steps.

    Args:
        places: falling timesteps of ``mask``; None: both paths by normalised step number.
        new_places: falling timesteps of the result.
    """
    share = sum(mask) / len(mask)
    wanted = min(steps, max(1, round(share * steps)))
    at = _old_numbers(len(mask), steps, places, new_places)
    computed = [index for index, step in enumerate(mask) if step]
    chosen: list[int] = []
    for number in range(wanted):
        target = _quantile(computed, len(mask), number * len(computed) / wanted)
        first = chosen[-1] + 1 if chosen else 0
        last = steps - (wanted - number)
        chosen.append(min(range(first, last + 1), key=lambda step: (abs(at[step] - target), step)))
    chosen[0] = 0
    return tuple(int(step in chosen) for step in range(steps))


def _quantile(computed: Sequence[int], length: int, rank: float) -> float:
    """Old step number of the ``rank``-th computed step, between two of them in proportion."""
    whole = int(rank)
    following = computed[whole + 1] if whole + 1 < len(computed) else length
    return computed[whole] + (rank - whole) * (following - computed[whole])


def _old_numbers(
    length: int, steps: int, places: Sequence[float] | None, new_places: Sequence[float] | None
) -> list[float]:
    """Each new step's place, as a fraction of old step numbers."""
    if places is None or new_places is None:
        return [step * length / steps for step in range(steps)]
    numbers = []
    for place in new_places:
        after = next((index for index, each in enumerate(places) if each < place), length)
        if after in (0, length):
            # Before the first or after the last: measured in the neighbouring interval.
            low, high = (0, 1) if after == 0 else (length - 2, length - 1)
        else:
            low, high = after - 1, after
        if length == 1:
            numbers.append(0.0)
            continue
        numbers.append(low + (places[low] - place) / (places[low] - places[high]))
    return numbers
