"""Tuned schedules as a config file carries them: one row for each number of steps and size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SettingError, nearest, shown

MAX_ROWS = 256
MAX_STEPS = 10_000
MAX_WEIGHTS = 4
ALLOWED = "expected a list of rows, each with steps and mask"


@dataclass(frozen=True, kw_only=True)
class TunedSchedule:
    """The schedule of requests of one number of steps and one size.

    Args:
        steps: denoising steps of the request, over all transformers.
        mask: one entry a step, 1 computed and 0 cached.
        size: width and height in pixels, and frames of a video; None: any.
        uncond_mask: the mask of the unconditional CFG branch; None: the same.
        order: order of the extrapolation; None: ``forecast_order``.
        damping: damping of the extrapolation; None: ``forecast_damping``.
        weights: for each step of ``mask`` marked 0, what the last computed outputs count, oldest first; they
            hold for ``timesteps`` only. None: those of the extrapolation.
        timesteps: the steps' places on the denoising path.
    """

    steps: int
    mask: tuple[int, ...]
    size: tuple[int, ...] | None = None
    uncond_mask: tuple[int, ...] | None = None
    order: int | None = None
    damping: float | None = None
    weights: tuple[tuple[float, ...], ...] | None = None
    timesteps: tuple[float, ...] | None = None

    def label(self) -> str:
        """Steps and size in words."""
        return describe(self.steps, self.size)

    def as_dict(self) -> dict[str, Any]:
        """The form of files and requests."""
        found: dict[str, Any] = {"steps": self.steps}
        if self.size is not None:
            found["size"] = "x".join(map(str, self.size))
        found["mask"] = "".join(map(str, self.mask))
        if self.uncond_mask is not None:
            found["uncond_mask"] = "".join(map(str, self.uncond_mask))
        for name in ("order", "damping"):
            if (value := getattr(self, name)) is not None:
                found[name] = value
        if self.weights is not None:
            found["weights"] = [list(each) for each in self.weights]
        if self.timesteps is not None:
            found["timesteps"] = list(self.timesteps)
        return found


def describe(steps: int, size: tuple[int, ...] | None) -> str:
    """Steps and size in words."""
    return f"{steps} steps" + ("" if size is None else " " + "x".join(map(str, size)))


def _whole(value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError
    return value


def _number(value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError
    if not low <= value <= high:
        raise ValueError
    return float(value)


def _mask(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        if not value or set(value) - {"0", "1"}:
            raise ValueError
        value = [int(step) for step in value]
    if not isinstance(value, list | tuple) or not value or len(value) > MAX_STEPS:
        raise ValueError
    mask = tuple(_whole(step, 0, 1) for step in value)
    if not mask[0]:
        raise ValueError
    return mask


def _size(value: Any) -> tuple[int, ...]:
    if not isinstance(value, str) or len(value) > 40:
        raise ValueError
    size = tuple(int(part) for part in value.lower().split("x"))
    if len(size) not in (2, 3) or min(size) < 1:
        raise ValueError
    return size


def _weights(value: Any) -> tuple[tuple[float, ...], ...]:
    if not isinstance(value, list | tuple) or len(value) > MAX_STEPS:
        raise ValueError
    rows = []
    for each in value:
        if not isinstance(each, list | tuple) or not 1 <= len(each) <= MAX_WEIGHTS:
            raise ValueError
        rows.append(tuple(_number(weight, -1e3, 1e3) for weight in each))
    return tuple(rows)


def _timesteps(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or len(value) > MAX_STEPS:
        raise ValueError
    places = tuple(_number(each) for each in value)
    if any(later >= earlier for earlier, later in itertools.pairwise(places)):
        raise ValueError
    return places


FIELDS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "steps": (lambda value: _whole(value, 1, MAX_STEPS), f"expected a whole number from 1 to {MAX_STEPS}"),
    "size": (_size, 'expected width and height, and frames of a video, such as "1024x1024"'),
    "mask": (_mask, 'expected 0 and 1 for each step, the first 1, such as "11101010"'),
    "uncond_mask": (_mask, 'expected 0 and 1 for each step, the first 1, such as "11101010"'),
    "order": (lambda value: _whole(value, 1, 3), "expected a whole number from 1 to 3"),
    "damping": (lambda value: _number(value, 0.0, 1.0), "expected a number from 0 to 1"),
    "weights": (_weights, f"expected for each 0 of the mask a list of 1 to {MAX_WEIGHTS} numbers"),
    "timesteps": (_timesteps, "expected one falling number for each step"),
}


RETIRED = frozenset({"spread"})
"""Keys that earlier files hold; they are left out with a warning."""


def retired_keys(value: Any) -> list[str]:
    """What a list of rows holds of ``RETIRED``."""
    return sorted({key for row in value or () if isinstance(row, Mapping) for key in row if key in RETIRED})


def read_rows(name: str, value: Any, origin: str) -> tuple[TunedSchedule, ...]:
    """The rows of a list of mappings.

    Raises:
        SettingError: naming row and field.
    """
    if not isinstance(value, list | tuple) or not value or len(value) > MAX_ROWS:
        raise SettingError(name, value, origin, f"{ALLOWED}, at most {MAX_ROWS}")
    if not all(isinstance(each, Mapping | TunedSchedule) for each in value):
        raise SettingError(name, value, origin, ALLOWED)
    rows = tuple(_read_row(f"{name}[{index}]", each, origin) for index, each in enumerate(value))
    seen = set()
    for index, row in enumerate(rows):
        if (row.steps, row.size) in seen:
            raise SettingError(f"{name}[{index}]", row.label(), origin, "there is already a row for these")
        seen.add((row.steps, row.size))
    return rows


def _read_row(name: str, value: Any, origin: str) -> TunedSchedule:
    if isinstance(value, TunedSchedule):
        value = value.as_dict()
    read = {}
    for key, given in value.items():
        if key in RETIRED:
            continue
        if not isinstance(key, str) or key not in FIELDS:
            label = key if isinstance(key, str) else shown(key)
            raise SettingError(f"{name}.{label}", given, origin, "unknown key", nearest(label, FIELDS))
        parse, allowed = FIELDS[key]
        try:
            read[key] = parse(given)
        except (TypeError, ValueError, OverflowError):
            raise SettingError(f"{name}.{key}", given, origin, allowed) from None
    for key in ("steps", "mask"):
        if key not in read:
            raise SettingError(f"{name}.{key}", None, origin, f"missing; {FIELDS[key][1]}")
    _check_lengths(name, read, origin)
    return TunedSchedule(**read)


def _check_lengths(name: str, read: Mapping[str, Any], origin: str) -> None:
    for key in ("mask", "uncond_mask", "timesteps"):
        if key in read and len(read[key]) != read["steps"]:
            raise SettingError(
                f"{name}.{key}", f"{len(read[key])} entries", origin, f"expected {read['steps']}, one a step"
            )
    cached = read["mask"].count(0)
    if "weights" in read and len(read["weights"]) != cached:
        raise SettingError(
            f"{name}.weights", f"{len(read['weights'])} lists", origin, f"expected {cached}, one for each 0 of the mask"
        )
