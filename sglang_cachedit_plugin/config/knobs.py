"""How one setting is read and checked: its kind, range and choices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import SettingError, nearest
from .tuned_schedules import ALLOWED as ROWS_ALLOWED
from .tuned_schedules import read_rows

MAX_LENGTH = 10_000
"""Most entries of a list, and most steps of a bin."""

PRESETS = ("none", "slow", "medium", "fast", "ultra")
_ALLOWED_PRESETS = "expected one of " + ", ".join(PRESETS)
_TRUE = {"true", "1", "yes", "y", "t", "on"}
_FALSE = {"false", "0", "no", "n", "f", "off"}
"""Words of a variable for true and false: those of the host's ``get_bool_env_var``."""


@dataclass(frozen=True, kw_only=True)
class Knob:
    """How one setting is read and checked.

    ``kind`` is one of ``bool``, ``int``, ``float``, ``choice``, ``bins`` (step counts), ``mask`` (a preset
    name or a list of 0 and 1) and ``rows`` (tuned schedules).
    """

    kind: str
    doc: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False
    env: str = ""
    per_transformer: bool = False

    def allowed(self) -> str:
        """What is accepted, in words."""
        if self.kind == "bool":
            text = "expected true or false"
        elif self.kind == "choice":
            text = "expected one of " + ", ".join(self.choices)
        elif self.kind == "bins":
            text = 'expected positive step counts such as "8,3,3,2,2"'
        elif self.kind == "rows":
            text = ROWS_ALLOWED
        elif self.kind == "mask":
            text = _ALLOWED_PRESETS + " or a list of 0 and 1"
        else:
            text = "expected " + ("a whole number" if self.kind == "int" else "a number") + self._range()
        return text + (", or null" if self.optional else "")

    def _range(self) -> str:
        if self.low is not None and self.high is not None:
            return f" from {self.low:g} to {self.high:g}"
        return f" of at least {self.low:g}" if self.low is not None else ""

    def check(self, name: str, value: Any, origin: str) -> Any:
        """``value`` in its final type, or SettingError."""
        if value is None and self.optional:
            return None
        if self.kind == "rows":
            return read_rows(name, value, origin)
        try:
            return getattr(self, f"_check_{self.kind}")(value)
        except (TypeError, ValueError, OverflowError):
            near = self.near(value) if isinstance(value, str) else None
            raise SettingError(name, value, origin, self.allowed(), near) from None

    def near(self, value: str) -> str | None:
        """A known value close to ``value``."""
        known = PRESETS if self.kind == "mask" else self.choices
        return nearest(value, known) if known else None

    def parse(self, name: str, text: str, origin: str) -> Any:
        """The value of an environment variable, or SettingError."""
        text = text.strip()
        if self.optional and text.lower() in ("none", "null"):
            return None
        if self.kind == "mask" and text not in PRESETS:
            raise SettingError(name, text, origin, _ALLOWED_PRESETS, self.near(text))
        try:
            value = self._from_text(text)
        except ValueError:
            raise SettingError(name, text, origin, self.allowed()) from None
        return self.check(name, value, origin)

    def _from_text(self, text: str) -> Any:
        if self.kind == "int":
            return int(text)
        if self.kind == "float":
            return float(text)
        if self.kind == "bool":
            if text.lower() in _TRUE:
                return True
            if text.lower() in _FALSE:
                return False
            raise ValueError(text)
        return text

    def _check_bool(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise TypeError(value)
        return value

    def _check_int(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(value)
        return int(self._in_range(value))

    def _check_float(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(value)
        return float(self._in_range(value))

    def _in_range(self, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError(value)
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise ValueError(value)
        return value

    def _check_choice(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.choices:
            raise ValueError(value)
        return value

    def _check_bins(self, value: Any) -> tuple[int, ...]:
        if isinstance(value, str):
            value = [int(part) for part in value.split(",")]
        if not isinstance(value, list | tuple) or not value or len(value) > MAX_LENGTH:
            raise ValueError(value)
        if any(isinstance(run, bool) or not isinstance(run, int) for run in value):
            raise ValueError(value)
        if not all(1 <= run <= MAX_LENGTH for run in value):
            raise ValueError(value)
        return tuple(int(run) for run in value)

    def _check_mask(self, value: Any) -> str | tuple[int, ...] | None:
        if isinstance(value, str):
            if value not in PRESETS:
                raise ValueError(value)
            return None if value == "none" else value
        if not isinstance(value, list | tuple) or not value or len(value) > MAX_LENGTH:
            raise ValueError(value)
        if any(isinstance(step, bool) or step not in (0, 1) for step in value):
            raise ValueError(value)
        if not any(value):
            raise ValueError(value)
        return tuple(int(step) for step in value)
