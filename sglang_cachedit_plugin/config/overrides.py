"""Settings given to a running server with ``PUT /v1/cache_dit``: they outrank the file and the environment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from ..errors import SettingError
from .config_file import unique_keys
from .settings import ALIASES, KNOBS
from .sources import BOOL, Source, Value, check_method, profile_name, read_layer, read_request

ORIGIN = "control"
SECTIONS = ("enabled", "profile", "cache_config", "secondary", "profiles")
MAX_BYTES = 64 << 10
"""Largest body of a change."""


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """A checked change, and the plain mapping it was read from (None: there is none)."""

    source: Source = field(default_factory=Source)
    profiles: Mapping[str, Source] = field(default_factory=dict)
    given: Mapping[str, Any] | None = None


def parse(text: bytes | str) -> Any:
    """The JSON value of a body; repeated keys and numbers that JSON does not know are refused.

    Raises:
        SettingError: not such a value.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise SettingError("body", _start(text), ORIGIN, f"not valid JSON: {error}") from None


def _start(text: bytes | str) -> str:
    return text[:60].decode("utf-8", "replace") if isinstance(text, bytes) else text[:60]


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def read_overrides(raw: Any, *, profiles: Mapping[str, Source] = MappingProxyType({})) -> Overrides:
    """Check a whole change.

    Args:
        raw: ``enabled``, ``profile``, ``secondary`` and ``profiles``, and knobs, flat or under ``cache_config``.
        profiles: those that the server knows besides those of ``raw``.

    Raises:
        SettingError: anything in it that cannot be used.
    """
    if not isinstance(raw, Mapping):
        raise SettingError("body", raw, ORIGIN, "expected a mapping of settings")
    enabled = raw.get("enabled")
    if enabled is not None:
        enabled = Value(BOOL.check("enabled", enabled, ORIGIN), ORIGIN)
    own = _profiles(raw.get("profiles"))
    nested = raw.get("cache_config")
    read_layer(raw, ORIGIN, [], extra=SECTIONS)
    flat = {key: value for key, value in raw.items() if key not in SECTIONS}
    if nested is not None:
        if flat:
            key = next(iter(flat))
            raise SettingError(key, flat[key], ORIGIN, "settings stand in cache_config or beside it, not both")
        read_layer(nested, f"{ORIGIN}.cache_config", [])
        flat = dict(nested)
    request = {**flat, "secondary": raw.get("secondary"), "profile": raw.get("profile")}
    known = {**profiles, **own}
    source = replace(read_request(request, origin=ORIGIN, profiles=known), enabled=enabled)
    check_method(source, known[source.profile] if source.profile else None)
    return Overrides(source=source, profiles=own, given=dict(raw))


def merged(before: Mapping[str, Any] | None, change: Any) -> Any:
    """The change in force with a further one in it, as JSON Merge Patch has it (RFC 7396): null takes a setting back.

    Whether the result can be used is left to ``read_overrides``.
    """
    if not isinstance(change, Mapping):
        return change
    result, change = _flat(before or {}), _flat(change)
    for key, value in change.items():
        name = ALIASES.get(key, key)
        kept = {each: own for each, own in result.items() if ALIASES.get(each, each) != name}
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping) and key in ("secondary", "profiles"):
            value = merged(result[key], value)
        result = kept if value is None and (name in KNOBS or key in SECTIONS) else kept | {key: value}
    return result


def _flat(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of ``cache_config`` beside the sections, unless there are some already."""
    nested = raw.get("cache_config")
    if not isinstance(nested, Mapping) or not set(raw) <= set(SECTIONS):
        return dict(raw)
    return {**{key: value for key, value in raw.items() if key != "cache_config"}, **nested}


def _profiles(raw: Any) -> dict[str, Source]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise SettingError("profiles", raw, ORIGIN, "expected a mapping of profile name to settings")
    return {
        name: read_request(knobs, origin=f"{ORIGIN}.profiles.{name}")
        for key, knobs in raw.items()
        if (name := profile_name(key, ORIGIN))
    }
