"""Where settings come from: environment, config file, live change, request; and which of them wins.

Precedence: request > live change > file > environment > the host's stage > default. Each effective value carries its
origin.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from ..errors import SettingError, nearest, printable, shown
from .diffusers_sections import read_sections
from .knobs import Choice, Flag, Knob, key_name, read_mapping, refuse
from .settings import (
    ALIASES,
    DBCACHE_KNOBS,
    GROUPS,
    INERT_KNOBS,
    KNOBS,
    MISSPELT,
    RETIRED_KNOBS,
    CacheSettings,
    contradictions,
)
from .tuned_schedules import RETIRED, TunedSchedule

PREFIX = "SGLANG_CACHE_DIT_"
ENABLED_VARIABLE = PREFIX + "ENABLED"
PROFILE_VARIABLE = PREFIX + "PROFILE"
CONTROL_KEY_VARIABLE = PREFIX + "CONTROL_KEY"
"""Key that changes of a running server need; it is no setting of the cache and is shown nowhere."""
LOG_VARIABLE = PREFIX + "LOG"
LOG_LEVELS = ("requests", "changes", "quiet")
"""What the log says besides warnings: a line a request and a change, a change, nothing."""
_OTHER_VARIABLES = (ENABLED_VARIABLE, PROFILE_VARIABLE, CONTROL_KEY_VARIABLE, LOG_VARIABLE)
REQUEST = "cache_dit_params"
"""Origin of a request's own settings."""
CONTROL = "control"
"""Origin of a live change's settings."""
MAX_NAME = 200
"""Longest name of a profile."""
MAX_FILE_BYTES = 1 << 20
MAX_CHANGE_BYTES = 64 << 10
FILE_SECTIONS = (
    "cache_config", "secondary", "profile", "profiles", "parallelism_config", "quantize_config", "attention_backend",
)
CHANGE_SECTIONS = ("enabled", "profile", "cache_config", "secondary", "profiles")
ENABLED = Flag()
LOG = Choice(choices=LOG_LEVELS)


@dataclass(frozen=True)
class Value:
    """One given value and where it was given."""

    value: Any
    origin: str


Layer = Mapping[str, Value]
"""Settings of one source: canonical name to value."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source's settings for the first and for the second transformer."""

    primary: Layer = field(default_factory=dict)
    secondary: Layer = field(default_factory=dict)
    enabled: Value | None = None
    profile: str | None = None
    profile_origin: str = ""

    @property
    def controls(self) -> bool | None:
        """Whether an error tolerance decides the steps, None where the source does not say."""
        if (tolerance := self.primary.get("error_tolerance")) is not None:
            return tolerance.value is not None
        return False if self.dbcache() is not None else None

    def dbcache(self) -> Value | None:
        """A setting that does without an error tolerance, where the source has one."""
        given = [*self.primary.items(), *self.secondary.items()]
        return next((value for name, value in given if name in DBCACHE_KNOBS), None)


@dataclass(frozen=True, kw_only=True)
class FileConfig:
    """A parsed ``--cache-dit-config`` file."""

    source: Source = field(default_factory=Source)
    profiles: Mapping[str, Source] = field(default_factory=dict)
    passed_on: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    given: str | Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """A checked live change (``PUT /v1/cache_dit``), and the mapping it was read from (None: there is none)."""

    source: Source = field(default_factory=Source)
    profiles: Mapping[str, Source] = field(default_factory=dict)
    given: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The settings of one request with their origins."""

    primary: CacheSettings
    secondary: CacheSettings
    origins: Mapping[str, str]
    secondary_origins: Mapping[str, str]
    profile: str | None = None

    def config(self) -> dict[str, dict[str, Any]]:
        """The ``config`` part of the report; secondary values appear where they differ."""
        found = {name: (getattr(self.primary, name), self.origins[name]) for name in KNOBS}
        for name in KNOBS:
            if (value := getattr(self.secondary, name)) != getattr(self.primary, name):
                found[f"secondary.{name}"] = value, self.secondary_origins[name]
        return {name: {"value": _plain(value), "origin": origin} for name, (value, origin) in found.items()}


def _plain(value: Any) -> Any:
    """A setting as the report shows it: of tuned schedules, what they are for."""
    rows = isinstance(value, tuple) and value and isinstance(value[0], TunedSchedule)
    return [row.label() for row in value] if rows else value


VARIABLES = {PREFIX + knob.env: name for name, knob in KNOBS.items() if knob.env}
RETIRED_VARIABLES = {
    PREFIX + second + name.upper(): why for name, why in RETIRED_KNOBS.items() for second in ("", "SECONDARY_")
}
SECONDARY_VARIABLES = {
    f"{PREFIX}SECONDARY_{knob.env}": name for name, knob in KNOBS.items() if knob.env and knob.per_transformer
}


def read_environment(
    environ: Mapping[str, str] = os.environ, host_variables: Callable[[], Collection[str]] = tuple
) -> tuple[Source, tuple[str, ...]]:
    """Settings of the environment, and warnings.

    Args:
        environ: the variables.
        host_variables: called only for names unknown here; variables that the installed host reads.
    """
    known = [*_OTHER_VARIABLES, *VARIABLES, *SECONDARY_VARIABLES]
    warnings = []
    for variable in sorted(name for name in environ if name.startswith(PREFIX) and name not in known):
        if variable not in host_variables():
            why = RETIRED_VARIABLES.get(variable)
            if (both := variable.replace("SECONDARY_", "")) in VARIABLES and both != variable:
                why = f"{both} holds for both transformers"
            spelt = {PREFIX + name.upper(): known_as for known_as, name in VARIABLES.items()}
            near = None if why else spelt.get(variable) or nearest(variable, known)
            raise SettingError(variable, environ[variable], "environment", why or "unknown variable", near)
        warnings.append(f"{variable} is known to the host but not to this plugin and has no effect")
    # Empty is unset: deployments clear a variable that way.
    given = {name: environ[name] for name in known if environ.get(name, "").strip()}
    LOG.parse(LOG_VARIABLE, given.get(LOG_VARIABLE, LOG_LEVELS[0]), "environment")
    enabled, profile = given.get(ENABLED_VARIABLE), given.get(PROFILE_VARIABLE, "").strip() or None
    source = Source(
        primary=_variables(given, VARIABLES), secondary=_variables(given, SECONDARY_VARIABLES), profile=profile,
        enabled=Value(ENABLED.parse(ENABLED_VARIABLE, enabled, "environment"), ENABLED_VARIABLE) if enabled else None,
        profile_origin=PROFILE_VARIABLE if profile else "",
    )
    check_method(source)
    return source, tuple(warnings)


def _variables(given: Mapping[str, str], variables: Mapping[str, str]) -> dict[str, Value]:
    layer = {
        name: Value(KNOBS[name].parse(variable, given[variable], "environment"), variable)
        for variable, name in variables.items() if variable in given
    }
    typed = {name: variable for variable, name in variables.items()}
    refuse(contradictions({name: value.value for name, value in layer.items()}), "environment", typed)
    return layer


def keys(*, secondary: bool) -> dict[str, Knob]:
    """Every key of a mapping of settings, but for other spellings."""
    return {name: knob for name, knob in KNOBS.items() if knob.per_transformer or not secondary} | dict(INERT_KNOBS)


_FOR_BOTH = {
    name: "it holds for both transformers and stands outside of secondary"
    for name, knob in KNOBS.items() if not knob.per_transformer
}
_ELSEWHERE = {
    "enabled": "a request says enable_cache_dit, beside cache_dit_params; a file's cache_config switches caching on",
    "enable_cache_dit": "a request says it beside cache_dit_params, a change of the server says enabled",
    "profile": "a profile is named beside cache_config, not in it",
}
"""What is no setting, and where it is said."""


def read_layer(
    raw: Any, origin: str, warnings: list[str], *, extra: Collection[str] = (), secondary: bool = False
) -> dict[str, Value]:
    """Check one mapping of knobs; keys in ``extra`` are left to the caller."""
    values, typed = read_mapping(
        raw, keys(secondary=secondary), origin, warnings, spellings=ALIASES, misspelt=MISSPELT, others=extra,
        refused={**RETIRED_KNOBS, **_ELSEWHERE, **(_FOR_BOTH if secondary else {})},
    )
    if old := [key for key in RETIRED if any(key in row for row in raw.get("schedules") or ())]:
        warnings.append(f"{', '.join(old)} in schedules ({origin}) is ignored: error_tolerance takes its place")
    refuse(contradictions(values), origin, typed)
    return {
        name: Value(value, f"{origin}.{typed[name]}") for name, value in values.items() if name not in INERT_KNOBS
    }


def read_file(path_or_mapping: str | Mapping[str, Any]) -> FileConfig:
    """Settings of a config file, or of the mapping that the offline engine takes in its place."""
    raw = path_or_mapping if isinstance(path_or_mapping, Mapping) else load_file(str(path_or_mapping))
    label = file_label(path_or_mapping)
    if not isinstance(raw, Mapping):
        raise SettingError("--cache-dit-config", raw, label, f"expected sections {', '.join(FILE_SECTIONS)}")
    sections = [*FILE_SECTIONS, "parallel_kwargs"]
    for key in raw:
        if key not in sections:
            allowed = "settings stand in cache_config" if key in KNOBS or key in ALIASES else "unknown section"
            raise SettingError(key_name(key), raw[key], label, allowed, nearest(key_name(key), sections))
    warnings: list[str] = []
    profiles = _read_profiles(raw.get("profiles"), label, f"{label} profiles", warnings)
    if (profile := raw.get("profile")) is not None and not (isinstance(profile, str) and profile):
        raise SettingError("profile", profile, label, "expected the name of a profile")
    primary, secondary = ({} if raw.get(key) is None else raw[key] for key in ("cache_config", "secondary"))
    source = Source(
        primary=read_layer(primary, f"{label} cache_config", warnings),
        secondary=read_layer(secondary, f"{label} secondary", warnings, secondary=True),
        # Profiles alone are only there to be named.
        enabled=Value(True, label) if raw.get("cache_config") is not None else None,
        profile=profile, profile_origin=label,
    )
    check_method(source)
    passed_on = read_sections(raw, label, warnings)
    return FileConfig(
        source=source, profiles=profiles, passed_on=passed_on, warnings=tuple(warnings), given=path_or_mapping
    )


def _read_profiles(raw: Any, origin: str, beneath: str, warnings: list[str]) -> dict[str, Source]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise SettingError("profiles", raw, origin, "expected a mapping of profile name to settings")
    profiles = {}
    for name, knobs in ((key_name(key), knobs) for key, knobs in raw.items()):
        # Reports and answers carry it.
        if not name or len(name) > MAX_NAME or not name.isprintable():
            allowed = f"a profile's name is 1 to {MAX_NAME} printable characters"
            raise SettingError("profiles", name, origin, allowed)
        profiles[name] = read_request(knobs, origin=f"{beneath}.{name}", warnings=warnings)
    return profiles


def read_request(
    raw: Any, *, origin: str = REQUEST, warnings: list[str] | None = None, profiles: Collection[str] = ()
) -> Source:
    """Settings of one request's ``cache_dit_params``.

    Args:
        profiles: names that ``profile`` may take.
    """
    if raw is None:
        return Source()
    warnings = [] if warnings is None else warnings
    primary = read_layer(raw, origin, warnings, extra=("secondary", "profile"))
    secondary, profile = raw.get("secondary"), raw.get("profile")
    if profile is not None:
        _check_profile("profile", profile, origin, profiles)
    layer = {} if secondary is None else read_layer(secondary, f"{origin}.secondary", warnings, secondary=True)
    source = Source(primary=primary, secondary=layer, profile=profile, profile_origin=origin)
    check_method(source)
    return source


def profile_of(source: Source, known: Mapping[str, Source]) -> Source:
    """The profile that a source names."""
    variable = source.profile_origin == PROFILE_VARIABLE
    field, origin = (PROFILE_VARIABLE, "environment") if variable else ("profile", source.profile_origin)
    _check_profile(field, source.profile, origin, known)
    return known[str(source.profile)]


def _check_profile(field: str, profile: Any, origin: str, known: Collection[str]) -> None:
    if not isinstance(profile, str) or profile not in known:
        allowed = f"expected one of: {', '.join(sorted(known)) or 'none is defined'}"
        raise SettingError(field, profile, origin, allowed, nearest(key_name(profile), known))


def read_overrides(raw: Any, *, profiles: Mapping[str, Source] = MappingProxyType({})) -> Overrides:
    """Check a whole live change.

    Args:
        raw: ``enabled``, ``profile``, ``secondary`` and ``profiles``, and knobs, flat or under ``cache_config``.
        profiles: those that the server knows besides those of ``raw``.

    Raises:
        SettingError: anything in it that cannot be used.
    """
    if not isinstance(raw, Mapping):
        raise SettingError("body", raw, CONTROL, "expected a mapping of settings")
    enabled = raw.get("enabled")
    if enabled is not None:
        enabled = Value(ENABLED.check("enabled", enabled, CONTROL), CONTROL)
    own = _read_profiles(raw.get("profiles"), CONTROL, f"{CONTROL}.profiles", [])
    read_layer(raw, CONTROL, [], extra=CHANGE_SECTIONS)
    knobs = {key: value for key, value in raw.items() if key not in CHANGE_SECTIONS}
    if (nested := raw.get("cache_config")) is not None:
        for key in knobs:
            raise SettingError(key, knobs[key], CONTROL, "settings stand in cache_config or beside it, not both")
        read_layer(nested, f"{CONTROL}.cache_config", [])
        knobs = dict(nested)
    request = {**knobs, "secondary": raw.get("secondary"), "profile": raw.get("profile")}
    known = {**profiles, **own}
    source = replace(read_request(request, origin=CONTROL, profiles=known), enabled=enabled)
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
        result = kept if value is None and (name in KNOBS or key in CHANGE_SECTIONS) else kept | {key: value}
    return result


def _flat(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of ``cache_config`` beside the sections, unless there are some already."""
    nested = raw.get("cache_config")
    if not isinstance(nested, Mapping) or not set(raw) <= set(CHANGE_SECTIONS):
        return dict(raw)
    return {**{key: value for key, value in raw.items() if key != "cache_config"}, **nested}


def check_method(source: Source, profile: Source | None = None) -> None:
    """Refuse an error tolerance beside settings that it leaves without effect.

    Args:
        profile: the one that ``source`` names.
    """
    own, named = (each.primary.get("error_tolerance") if each else None for each in (source, profile))
    if own is not None and own.value is None:
        # It speaks against control itself.
        return
    if (other := source.dbcache()) is not None:
        if own is not None:
            raise _contradiction(other, own.origin.rpartition(".")[2])
        if named is not None and named.value is not None:
            raise _contradiction(other, f"profile {source.profile}, which is an error tolerance")
    if own is not None and profile is not None and profile.dbcache() is not None:
        raise _contradiction(own, f"profile {source.profile}, which does without")


def _contradiction(value: Value, other: str) -> SettingError:
    where, _, name = value.origin.rpartition(".")
    return SettingError(
        name, value.value, where or "environment", f"without effect beside {other}, drop one of the two"
    )


def resolve(*strongest_first: Source) -> Resolved:
    """Effective settings of sources given strongest first."""
    sources = _one_method(strongest_first)
    primary, origins = _merge([source.primary for source in sources])
    secondary, secondary_origins = _merge([layer for each in sources for layer in (each.secondary, each.primary)])
    profile = next((source.profile for source in sources if source.profile), None)
    return Resolved(
        primary=primary, secondary=secondary, origins=origins, secondary_origins=secondary_origins, profile=profile
    )


def _one_method(strongest_first: Sequence[Source]) -> Sequence[Source]:
    """The sources without what the strongest one leaves without effect that names a tolerance or DBCache's settings."""
    for index, source in enumerate(strongest_first):
        stronger, weaker = strongest_first[:index], strongest_first[index + 1 :]
        if source.controls:
            return (*stronger, source, *(_without(DBCACHE_KNOBS, each) for each in weaker))
        if "error_tolerance" in source.primary:
            break
        if (other := source.dbcache()) is not None:
            if any("error_tolerance" in each.primary for each in weaker):
                primary = {**source.primary, "error_tolerance": Value(None, other.origin)}
                weaker = tuple(_without({"error_tolerance"}, each) for each in weaker)
                return (*stronger, replace(source, primary=primary), *weaker)
            break
    return strongest_first


def _without(names: Collection[str], source: Source) -> Source:
    primary, secondary = (
        {name: value for name, value in layer.items() if name not in names}
        for layer in (source.primary, source.secondary)
    )
    return replace(source, primary=primary, secondary=secondary)


def _merge(layers: list[Layer]) -> tuple[CacheSettings, dict[str, str]]:
    found: dict[str, Value] = {}
    for group in GROUPS:
        layer = next((layer for layer in layers if not group.isdisjoint(layer)), {})
        found |= {name: layer[name] for name in group if name in layer}
    origins = {name: found[name].origin if name in found else "default" for name in KNOBS}
    return CacheSettings(**{name: value.value for name, value in found.items()}), origins


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses repeated keys and aliases (a small file can expand without bound)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        # A list of keys: what a mapping cannot hold as a key is refused there.
        _unique([(self.construct_object(key_node, deep=True), None) for key_node, _ in node.value])
        return super().construct_mapping(node, deep)


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping, refused when it repeats a key."""
    mapping: dict[Any, Any] = {}
    for name, value in pairs:
        if name in mapping:
            raise ValueError(f"key {shown(name)} is given twice")
        mapping[name] = value
    return mapping


def load_file(path: str) -> Any:
    """The parsed YAML or JSON of a small regular file of UTF-8; SettingError for anything that is not one."""
    try:
        # The mark that some editors put first is no part of the text.
        text = _read_bytes(path).decode("utf-8-sig")
        if path.endswith(".json"):
            parsed = json.loads(text, object_pairs_hook=_unique)
        else:
            parsed = yaml.load(text, _UniqueKeyLoader)
        problem = "the file is empty" if parsed is None else None
    except UnicodeDecodeError:
        problem = "not UTF-8 text"
    except OSError as error:
        problem = error.strerror or "unreadable"
    except Exception as error:
        # Besides YAMLError: PyYAML's constructors raise KeyError, IndexError and AttributeError for
        # scalars that are not what their tag says, such as ``!!bool maybe``.
        problem = f"not valid YAML or JSON: {error}"
    if problem is not None:
        raise SettingError("--cache-dit-config", path, "command line", problem)
    return parsed


def _read_bytes(path: str) -> bytes:
    """What stands in a regular file; of anything else (a pipe would wait for a writer) nothing is read."""
    file = Path(path)
    if not file.is_file():
        what = "a folder, expected a file" if file.is_dir() else "not a file" if file.exists() else "no such file"
        raise OSError(0, what)
    with file.open("rb") as source:
        content = source.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise OSError(0, f"larger than {MAX_FILE_BYTES} bytes")
    return content


def file_label(path_or_mapping: str | Mapping[str, Any] | None) -> str:
    """How origins name a config file."""
    if not isinstance(path_or_mapping, str):
        return "cache_dit_config"
    # Reports carry it: a name that is not text must not spoil their encoding.
    return printable(os.path.basename(path_or_mapping))


def parse_change(text: bytes | str) -> Any:
    """The JSON value of a body; repeated keys and numbers that JSON does not know are refused.

    Raises:
        SettingError: not such a value.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        start = text[:60].decode("utf-8", "replace") if isinstance(text, bytes) else text[:60]
        raise SettingError("body", start, CONTROL, f"not valid JSON: {error}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


PROFILES: Mapping[str, Mapping[str, Any]] = {
    "quality": {"error_tolerance": 0.003}, "balanced": {"error_tolerance": 0.01}, "fast": {"error_tolerance": 0.08},
}
"""Profiles that every server knows, chosen by measurement on the demo models: see docs/quality.md."""

BUILT_IN: Mapping[str, Source] = {
    name: read_request(knobs, origin=f"built-in profiles.{name}") for name, knobs in PROFILES.items()
}
