"""Kinds of settings. One declaration gives the check, the words of a refusal, near names, JSON Schema and docs.

They are not pydantic's types: a refusal shows what was typed, where, what is allowed and a near name, variables are
read with the same words, and the docs quote them; each would be one more layer over pydantic's own messages.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar

from ..errors import SettingError, nearest, shown

MAX_LENGTH = 10_000
"""Most entries of a list, and most steps of a bin."""
PRESETS = ("none", "slow", "medium", "fast", "ultra")
_TRUE = {"true", "1", "yes", "y", "t", "on"}
_FALSE = {"false", "0", "no", "n", "f", "off"}
"""Words of a variable for true and false: those of the host's ``get_bool_env_var``."""
_NOTHING: Mapping[str, str] = MappingProxyType({})


def entries(value: Any, least: int = 1, most: int = MAX_LENGTH) -> list[Any] | tuple[Any, ...]:
    """``value``, where it is a list of so many entries; TypeError otherwise."""
    if not isinstance(value, list | tuple) or not least <= len(value) <= most:
        raise TypeError(value)
    return value


def bits(value: Any) -> tuple[int, ...]:
    """A list of 0 and 1; TypeError or ValueError otherwise."""
    if any(isinstance(step, bool) or step not in (0, 1) for step in entries(value)):
        raise ValueError(value)
    return tuple(int(step) for step in value)


def json_list(items: Mapping[str, Any], least: int = 1, most: int = MAX_LENGTH) -> dict[str, Any]:
    """The JSON Schema of a list."""
    return {"type": "array", "items": dict(items), **({"minItems": least} if least else {}), "maxItems": most}


@dataclass(frozen=True)
class Knob(ABC):
    """How one setting is read and checked.

    Args:
        choices: words that it takes; a misspelt one is named the nearest of them.
        env: its environment variable without the prefix; empty: it has none.
        optional: null is accepted too.
        per_transformer: the second transformer may have a value of its own.
    """

    doc: str = ""
    _: KW_ONLY
    unit: str = ""
    env: str = ""
    optional: bool = False
    per_transformer: bool = True
    choices: tuple[str, ...] = ()

    @property
    @abstractmethod
    def words(self) -> str:
        """What is accepted."""

    @property
    @abstractmethod
    def json(self) -> Mapping[str, Any]:
        """The JSON Schema of a value that is not null."""

    @abstractmethod
    def read(self, value: Any) -> Any:
        """``value`` in its final type; TypeError, ValueError or OverflowError where it is not accepted."""

    def from_text(self, text: str) -> Any:
        """The value that a variable writes so; ValueError where it writes none."""
        return text

    def allowed(self) -> str:
        """What is accepted, as a refusal says it."""
        return f"expected {self.words}" + (", or null" if self.optional else "")

    def check(self, name: str, value: Any, origin: str) -> Any:
        """``value`` in its final type, or SettingError."""
        if value is None and self.optional:
            return None
        try:
            return self.read(value)
        except (TypeError, ValueError, OverflowError):
            near = nearest(value, self.choices) if isinstance(value, str) else None
            raise SettingError(name, value, origin, self.allowed(), near) from None

    def parse(self, name: str, text: str, origin: str) -> Any:
        """The value of an environment variable, or SettingError."""
        text = text.strip()
        if self.optional and text.lower() in ("none", "null"):
            return None
        try:
            value = self.from_text(text)
        except ValueError:
            raise SettingError(name, text, origin, self.allowed()) from None
        return self.check(name, value, origin)

    def schema(self, default: Any = None) -> dict[str, Any]:
        """The JSON Schema of the setting."""
        found: dict[str, Any] = {"anyOf": [self.json, {"type": "null"}]} if self.optional else dict(self.json)
        if self.doc:
            found["description"] = self.doc + (f" Unit: {self.unit}." if self.unit else "")
        return found if default is None else found | {"default": default}


class Flag(Knob):
    words: ClassVar[str] = "true or false"
    json: ClassVar[Mapping[str, Any]] = {"type": "boolean"}

    def read(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise TypeError(value)
        return value

    def from_text(self, text: str) -> bool:
        if text.lower() not in _TRUE | _FALSE:
            raise ValueError(text)
        return text.lower() in _TRUE


@dataclass(frozen=True, kw_only=True)
class Number(Knob):
    """A finite number from ``low`` to ``high``."""

    low: float | None = None
    high: float | None = None
    noun: ClassVar[tuple[str, str]] = ("a number", "number")
    type: ClassVar[type[float]] = float

    @property
    def words(self) -> str:
        if self.low is None or self.high is None:
            return self.noun[0] + ("" if self.low is None else f" of at least {self.low:g}")
        return f"{self.noun[0]} from {self.low:g} to {self.high:g}"

    @property
    def json(self) -> Mapping[str, Any]:
        limits = {"minimum": self.low, "maximum": self.high}
        return {"type": self.noun[1], **{name: limit for name, limit in limits.items() if limit is not None}}

    def read(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, self.type | int) or not math.isfinite(value):
            raise TypeError(value)
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise ValueError(value)
        return self.type(value)

    def from_text(self, text: str) -> float:
        return self.type(text)


class Whole(Number):
    noun: ClassVar[tuple[str, str]] = ("a whole number", "integer")
    type: ClassVar[type[float]] = int


class Choice(Knob):
    @property
    def words(self) -> str:
        return "one of " + ", ".join(self.choices)

    @property
    def json(self) -> Mapping[str, Any]:
        return {"enum": list(self.choices)}

    def read(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.choices:
            raise ValueError(value)
        return value


class Bins(Knob):
    """Step counts, as a list or as text with commas."""

    count: ClassVar[Knob] = Whole(low=1, high=MAX_LENGTH)
    words: ClassVar[str] = 'positive step counts such as "8,3,3,2,2"'
    json: ClassVar[Mapping[str, Any]] = {
        "anyOf": [json_list(count.json), {"type": "string", "pattern": r"^[^A-Za-z]*\d[^A-Za-z]*$"}]
    }

    def read(self, value: Any) -> tuple[int, ...]:
        counts = [int(part) for part in value.split(",")] if isinstance(value, str) else value
        return tuple(self.count.read(run) for run in entries(counts))


@dataclass(frozen=True, kw_only=True)
class Mask(Knob):
    """A preset, or 0 and 1 for each step; ``none`` is read as None."""

    choices: tuple[str, ...] = PRESETS
    words: ClassVar[str] = f"one of {', '.join(PRESETS)} or a list of 0 and 1"
    json: ClassVar[Mapping[str, Any]] = {
        "anyOf": [{"enum": list(PRESETS)}, json_list({"enum": [0, 1]}) | {"contains": {"const": 1}}]
    }

    def read(self, value: Any) -> str | tuple[int, ...] | None:
        if isinstance(value, str):
            preset = Choice(choices=PRESETS).read(value)
            return None if preset == "none" else preset
        if not any(mask := bits(value)):
            raise ValueError(value)
        return mask

    def parse(self, name: str, text: str, origin: str) -> Any:
        """A preset; a variable takes no list."""
        preset = text.strip()
        return None if preset.lower() in ("none", "null") else Choice(choices=PRESETS).parse(name, preset, origin)


def json_object(knobs: Mapping[str, Knob], defaults: object = None) -> dict[str, Any]:
    """The JSON Schema of a mapping of settings.

    Args:
        defaults: what has the settings' defaults as attributes.
    """
    properties = {name: knob.schema(getattr(defaults, name, None)) for name, knob in knobs.items()}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def setting(knob: Knob, default: Any = MISSING) -> Any:
    """A dataclass field that ``knob`` declares."""
    return field(default=default, metadata={"knob": knob})


def declared(settings: type) -> dict[str, Knob]:
    """The settings that a dataclass declares."""
    return {each.name: each.metadata["knob"] for each in fields(settings)}


def read_mapping(
    raw: Any, knobs: Mapping[str, Knob], origin: str, warnings: list[str], *, spellings: Mapping[str, str] = _NOTHING,
    misspelt: Mapping[str, str] = _NOTHING, refused: Mapping[str, str] = _NOTHING, others: Collection[str] = (),
    prefix: str = "",
) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a mapping of settings: the value of each, and the key that it was given under.

    Args:
        spellings: other names of a setting; ``misspelt``: those that bring a warning.
        refused: keys that get a refusal of their own.
        others: keys that are the caller's.
        prefix: what an error puts before a key.

    Raises:
        SettingError: naming key, value and origin.
    """
    if not isinstance(raw, Mapping):
        raise SettingError(origin.rsplit(" ", 1)[-1], raw, origin, "expected a mapping of settings")
    values: dict[str, Any] = {}
    typed: dict[str, str] = {}
    for key, value in raw.items():
        label = key_name(key)
        name = spellings.get(label, misspelt.get(label, label))
        if label in others:
            continue
        if label in refused:
            raise SettingError(label, value, origin, refused[label])
        if name not in knobs or not isinstance(key, str):
            variables = {knob.env: name for name, knob in knobs.items() if knob.env}
            near = variables.get(label.upper().removeprefix("SGLANG_CACHE_DIT_"))
            near = near or nearest(label, [*knobs, *spellings, *others])
            raise SettingError(prefix + label, value, origin, "unknown key", near)
        if name in typed:
            raise SettingError(label, value, origin, f"given twice, also as {typed[name]}")
        if label in misspelt:
            warnings.append(f"{label} ({origin}) is read as {name}")
        values[name], typed[name] = knobs[name].check(prefix + label, value, origin), key
    return values, typed


def key_name(key: Any) -> str:
    """A key of a mapping as a field name; YAML allows keys of any type."""
    return key if isinstance(key, str) else shown(key)


def refuse(problems: Iterable[tuple[str, Any, str]], origin: str, typed: Mapping[str, str] = _NOTHING) -> None:
    """Raise the first of some problems: name of the setting, value, what is wrong.

    Args:
        typed: what this source calls a setting, where that is another name.
    """
    for name, value, problem in problems:
        raise SettingError(typed.get(name, name), value, origin, problem)
