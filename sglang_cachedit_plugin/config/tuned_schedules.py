"""Tuned schedules, one row for each number of steps and size, and which of them serves a request.

A row of the request's own steps and size is taken as it is. Otherwise the row nearest in the number of steps, then in
the number of pixels, is resampled: its share of computed steps is kept, and they are placed so that they have the same
distribution over the timesteps (or sigmas), where both are known, else over the normalised step number. Fitted weights
belong to their timesteps and are left out; order and damping stay.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..errors import SettingError
from .knobs import Knob, Number, Whole, bits, declared, entries, json_list, json_object, read_mapping, refuse, setting

MAX_ROWS = 256
MAX_STEPS = 10_000
MAX_WEIGHTS = 4
RETIRED = ("spread",)
"""Keys that rows of earlier files hold; they are left out with a warning."""
TOLERANCE = 0.005
"""Timesteps count as the tuned ones up to this part of their range."""


class Size(Knob):
    words: ClassVar[str] = 'width and height, and frames of a video, such as "1024x1024"'
    json: ClassVar[Mapping[str, Any]] = {"type": "string", "pattern": "[xX]"}

    def read(self, value: Any) -> tuple[int, ...]:
        if not isinstance(value, str) or len(value) > 40:
            raise TypeError(value)
        size = tuple(int(part) for part in value.lower().split("x"))
        if len(size) not in (2, 3) or min(size) < 1:
            raise ValueError(value)
        return size


class StepMask(Knob):
    words: ClassVar[str] = '0 and 1 for each step, the first 1, such as "11101010"'
    json: ClassVar[Mapping[str, Any]] = {
        "anyOf": [{"type": "string", "pattern": "^1[01]*$"}, json_list({"enum": [0, 1]}, 1, MAX_STEPS)]
    }

    def read(self, value: Any) -> tuple[int, ...]:
        mask = bits(["01".index(step) for step in value] if isinstance(value, str) else value)
        if not mask[0]:
            raise ValueError(value)
        return mask


class Weights(Knob):
    weight: ClassVar[Number] = Number(low=-1e3, high=1e3)
    words: ClassVar[str] = f"for each 0 of the mask a list of 1 to {MAX_WEIGHTS} numbers"
    json: ClassVar[Mapping[str, Any]] = json_list(json_list(weight.json, 1, MAX_WEIGHTS), 0, MAX_STEPS)

    def read(self, value: Any) -> tuple[tuple[float, ...], ...]:
        rows = (entries(row, 1, MAX_WEIGHTS) for row in entries(value, 0, MAX_STEPS))
        return tuple(tuple(self.weight.read(each) for each in row) for row in rows)


class Timesteps(Knob):
    words: ClassVar[str] = "one falling number for each step"
    json: ClassVar[Mapping[str, Any]] = json_list(Number().json, 0, MAX_STEPS)

    def read(self, value: Any) -> tuple[float, ...]:
        timesteps = tuple(Number().read(each) for each in entries(value, 0, MAX_STEPS))
        if any(later >= earlier for earlier, later in itertools.pairwise(timesteps)):
            raise ValueError(value)
        return timesteps


@dataclass(frozen=True, kw_only=True)
class TunedSchedule:
    """The schedule of requests of one number of steps and one size; a field that is None has the meaning of one that
    a file leaves out.
    """

    steps: int = setting(Whole("Denoising steps of the request, over all transformers.", low=1, high=MAX_STEPS))
    size: tuple[int, ...] | None = setting(Size(
        "Width and height in pixels, and frames of a video; left out: any."
    ), None)
    mask: tuple[int, ...] = setting(StepMask("One entry a step, 1 computed and 0 cached."))
    uncond_mask: tuple[int, ...] | None = setting(StepMask(
        "The mask of the unconditional CFG branch; left out: the same."
    ), None)
    order: int | None = setting(Whole("Order of the extrapolation; left out: forecast_order.", low=1, high=3), None)
    damping: float | None = setting(Number(
        "Damping of the extrapolation; left out: forecast_damping.", low=0, high=1
    ), None)
    weights: tuple[tuple[float, ...], ...] | None = setting(Weights(
        "For each step of the mask marked 0, what the last computed outputs count, oldest first; they hold for these "
        "timesteps only. Left out: those of the extrapolation.",
    ), None)
    timesteps: tuple[float, ...] | None = setting(Timesteps("The steps' places on the denoising path."), None)

    def label(self) -> str:
        """Steps and size in words."""
        return _label(self.steps, self.size)


FIELDS: Mapping[str, Knob] = declared(TunedSchedule)


class Rows(Knob):
    """Tuned schedules."""

    words: ClassVar[str] = f"a list of at most {MAX_ROWS} rows, each with steps and mask"

    @property
    def json(self) -> Mapping[str, Any]:
        """Lengths and what excludes what are left to the check."""
        row = json_object(FIELDS) | {"required": ["steps", "mask"]}
        row["properties"] |= {key: {"description": "Ignored; error_tolerance takes its place."} for key in RETIRED}
        return json_list(row, 1, MAX_ROWS)

    def read(self, value: Any) -> Any:
        if not all(isinstance(each, Mapping) for each in entries(value, 1, MAX_ROWS)):
            raise TypeError(value)
        return value

    def check(self, name: str, value: Any, origin: str) -> Any:
        """The rows of a list of mappings; SettingError names row and field."""
        if (given := super().check(name, value, origin)) is None:
            return None
        rows: dict[Any, TunedSchedule] = {}
        for index, each in enumerate(given):
            row = _read_row(f"{name}[{index}]", each, origin)
            if rows.setdefault((row.steps, row.size), row) is not row:
                raise SettingError(f"{name}[{index}]", row.label(), origin, "there is already a row for these")
        return tuple(rows.values())


def _read_row(name: str, value: Any, origin: str) -> TunedSchedule:
    read, _ = read_mapping(value, FIELDS, origin, [], prefix=f"{name}.", others=RETIRED)
    refuse(((f"{name}.{key}", shown, problem) for key, shown, problem in _problems(read)), origin)
    return TunedSchedule(**read)


def _problems(read: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    for key in ("steps", "mask"):
        if key not in read:
            yield key, None, f"missing; {FIELDS[key].allowed()}"
    for key in ("mask", "uncond_mask", "timesteps"):
        if key in read and len(read[key]) != read["steps"]:
            yield key, f"{len(read[key])} entries", f"expected {read['steps']}, one a step"
    cached = read["mask"].count(0)
    if "weights" in read and len(read["weights"]) != cached:
        yield "weights", f"{len(read['weights'])} lists", f"expected {cached}, one for each 0 of the mask"


def _label(steps: int, size: tuple[int, ...] | None) -> str:
    return f"{steps} steps" + ("" if size is None else " " + "x".join(map(str, size)))


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
    paths = (row.timesteps, timesteps) if known else (None, None)
    mask = resample(row.mask, steps, *paths)
    note = (
        f"no schedule was tuned for {_label(steps, size)}{' with these timesteps' if fits else ''}: the one for "
        f"{row.label()} is resampled over {'timesteps' if known else 'the step number'}, {sum(mask)} steps computed"
    )
    return replace(
        row, steps=steps, size=size, mask=mask, weights=None, timesteps=None,
        uncond_mask=row.uncond_mask and resample(row.uncond_mask, steps, *paths),
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
    mask: Sequence[int], steps: int, path: Sequence[float] | None = None, new_path: Sequence[float] | None = None
) -> tuple[int, ...]:
    """``mask`` for another number of steps, with the same share and distribution of computed steps.

    Args:
        path: falling timesteps of ``mask``; None: both paths by normalised step number.
        new_path: falling timesteps of the result.
    """
    wanted = min(steps, max(1, round(sum(mask) / len(mask) * steps)))
    at = _old_numbers(len(mask), steps, path, new_path)
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
    length: int, steps: int, path: Sequence[float] | None, new_path: Sequence[float] | None
) -> list[float]:
    """Each new step's place, as a fraction of old step numbers."""
    if path is None or new_path is None:
        return [step * length / steps for step in range(steps)]
    if length == 1:
        return [0.0] * steps
    numbers = []
    for timestep in new_path:
        after = next((index for index, each in enumerate(path) if each < timestep), length)
        # Before the first or after the last step: measured in the neighbouring interval.
        low = min(max(after - 1, 0), length - 2)
        numbers.append(low + (path[low] - timestep) / (path[low] - path[low + 1]))
    return numbers
