"""Where settings come from: environment, config file, request; and which of them wins.

Precedence: request > live change > file > environment > the host's stage > default. Each effective value carries its
origin.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..errors import SettingError, nearest, shown
from .config_file import MAX_FILE_BYTES, file_label, load_file, unique_keys
from .diffusers_sections import read_sections
from .settings import (
    ALIASES,
    CALIBRATOR_KNOBS,
    DBCACHE_KNOBS,
    INERT_KNOBS,
    KNOBS,
    RETIRED_KNOBS,
    SCHEDULE_KNOBS,
    CacheSettings,
    Knob,
    check_consistent,
)
from .tuned_schedules import TunedSchedule, retired_keys

__all__ = [
    "BOOL", "CONTROL_KEY_VARIABLE", "ENABLED_VARIABLE", "FILE_SECTIONS", "LOG_LEVELS", "LOG_VARIABLE", "MAX_FILE_BYTES",
    "PREFIX", "PROFILE_VARIABLE", "SECONDARY_VARIABLES", "VARIABLES", "FileConfig", "Layer", "Resolved", "Source",
    "Value", "file_label", "load_file", "read_environment", "read_file", "read_layer", "read_request", "resolve",
    "unique_keys",
]

PREFIX = "SGLANG_CACHE_DIT_"
ENABLED_VARIABLE = PREFIX + "ENABLED"
PROFILE_VARIABLE = PREFIX + "PROFILE"
CONTROL_KEY_VARIABLE = PREFIX + "CONTROL_KEY"
"""Key that changes of a running server need; it is no setting of the cache and is shown nowhere."""
LOG_VARIABLE = PREFIX + "LOG"
LOG_LEVELS = ("requests", "changes", "quiet")
"""What the log says besides warnings: a line a request and a change, a change, nothing."""
REQUEST = "cache_dit_params"
"""Origin of a request's own settings."""
MAX_NAME = 200
"""Longest name of a profile."""
FILE_SECTIONS = (
    "cache_config", "secondary", "profile", "profiles", "parallelism_config", "quantize_config", "attention_backend",
)
_MISSPELT = {"enable_sperate_cfg": "enable_separate_cfg"}
BOOL = Knob(kind="bool", doc="")


@dataclass(frozen=True)
class Value:
    """One given value and where it was given."""

    value: Any
    origin: str


Layer = Mapping[str, Value]
"""Settings of one source: canonical name to value."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source's settings for the first and for the second transformer.

    Args:
        implied: the switch where no source says ``enabled``.
    """

    primary: Layer = field(default_factory=dict)
    secondary: Layer = field(default_factory=dict)
    enabled: Value | None = None
    implied: Value | None = None
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
        given = (value for layer in (self.primary, self.secondary) for name, value in layer.items()
                 if name in DBCACHE_KNOBS)
        return next(given, None)


@dataclass(frozen=True, kw_only=True)
class FileConfig:
    """A parsed ``--cache-dit-config`` file."""

    source: Source = field(default_factory=Source)
    profiles: Mapping[str, Source] = field(default_factory=dict)
    passed_on: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    given: str | Mapping[str, Any] | None = None


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
        report = {
            name: {"value": _plain(getattr(self.primary, name)), "origin": self.origins[name]} for name in KNOBS
        }
        for name in KNOBS:
            value = getattr(self.secondary, name)
            if value != getattr(self.primary, name):
                report[f"secondary.{name}"] = {"value": _plain(value), "origin": self.secondary_origins[name]}
        return report


def _plain(value: Any) -> Any:
    """A setting as the report shows it: of tuned schedules, what they are for."""
    if isinstance(value, tuple) and value and isinstance(value[0], TunedSchedule):
        return [row.label() for row in value]
    return value


def _variables(prefix: str, per_transformer_only: bool) -> dict[str, str]:
    return {
        prefix + knob.env: name
        for name, knob in KNOBS.items()
        if knob.env and (knob.per_transformer or not per_transformer_only)
    }


VARIABLES = _variables(PREFIX, False)
SECONDARY_VARIABLES = _variables(PREFIX + "SECONDARY_", True)
RETIRED_VARIABLES = {
    PREFIX + second + name.upper(): why for name, why in RETIRED_KNOBS.items() for second in ("", "SECONDARY_")
}


def read_environment(
    environ: Mapping[str, str] = os.environ, host_variables: Callable[[], Collection[str]] = tuple
) -> tuple[Source, tuple[str, ...]]:
    """Settings of the environment, and warnings.

    Args:
        environ: the variables.
        host_variables: called only for names unknown here; variables that the installed host reads.
    """
    layers: tuple[dict[str, Value], dict[str, Value]] = ({}, {})
    enabled, profile, warnings = None, None, []
    for variable in sorted(name for name in environ if name.startswith(PREFIX)):
        text = environ[variable]
        if variable in (CONTROL_KEY_VARIABLE, LOG_VARIABLE):
            _check_level(variable, text)
            continue
        if variable in (ENABLED_VARIABLE, PROFILE_VARIABLE, *VARIABLES, *SECONDARY_VARIABLES) and not text.strip():
            # Empty is unset: deployments clear a variable that way.
            continue
        if variable == ENABLED_VARIABLE:
            enabled = Value(BOOL.parse(variable, text, "environment"), variable)
        elif variable == PROFILE_VARIABLE:
            profile = text.strip()
        elif variable in VARIABLES or variable in SECONDARY_VARIABLES:
            secondary = variable in SECONDARY_VARIABLES
            name = (SECONDARY_VARIABLES if secondary else VARIABLES)[variable]
            layers[secondary][name] = Value(KNOBS[name].parse(variable, text, "environment"), variable)
        elif (why := RETIRED_VARIABLES.get(variable)) is not None:
            raise SettingError(variable, text, "environment", why)
        elif variable in host_variables():
            warnings.append(f"{variable} is known to the host but not to this plugin and has no effect")
        else:
            words = (ENABLED_VARIABLE, PROFILE_VARIABLE, CONTROL_KEY_VARIABLE, LOG_VARIABLE)
            known = [*words, *VARIABLES, *SECONDARY_VARIABLES]
            raise SettingError(
                variable, text, "environment", "unknown variable", nearest(variable, known)
            )
    for layer, variables in zip(layers, (VARIABLES, SECONDARY_VARIABLES), strict=True):
        spelt = {name: variable for variable, name in variables.items()}
        check_consistent({n: v.value for n, v in layer.items()}, "environment", spelt)
    source = Source(
        primary=layers[0], secondary=layers[1], enabled=enabled, profile=profile,
        implied=Value(True, PROFILE_VARIABLE) if profile else None, profile_origin="environment" if profile else "",
    )
    check_method(source)
    return source, tuple(warnings)


def _check_level(variable: str, text: str) -> None:
    if variable == LOG_VARIABLE and (word := text.strip()) not in ("", *LOG_LEVELS):
        allowed = f"expected one of {', '.join(LOG_LEVELS)}"
        raise SettingError(variable, text, "environment", allowed, nearest(word, LOG_LEVELS))


def read_layer(
    raw: Any, origin: str, warnings: list[str], *, extra: Collection[str] = (), secondary: bool = False
) -> dict[str, Value]:
    """Check one mapping of knobs; keys in ``extra`` are left to the caller."""
    if not isinstance(raw, Mapping):
        raise SettingError(origin.rsplit(" ", 1)[-1], raw, origin, "expected a mapping of settings")
    layer: dict[str, Value] = {}
    spelt: dict[str, str] = {}
    known = _known_keys(secondary)
    for key, value in raw.items():
        if key in extra:
            continue
        if key in _MISSPELT:
            warnings.append(f"{key} ({origin}) is read as {_MISSPELT[key]}")
            key = _MISSPELT[key]
        if key in INERT_KNOBS:
            if value is not None:
                BOOL.check(key, value, origin)
            continue
        if not isinstance(key, str) or key not in known:
            raise _unknown(_name(key), value, origin, [*known, *extra])
        name = ALIASES.get(key, key)
        if name in layer:
            raise SettingError(key, value, origin, f"given twice, also as {spelt[name]}")
        spelt[name] = key
        layer[name] = Value(KNOBS[name].check(key, value, origin), f"{origin}.{key}")
        if KNOBS[name].kind == "rows" and (old := retired_keys(value)):
            warnings.append(f"{', '.join(old)} in {key} ({origin}) is ignored: error_tolerance takes its place")
    check_consistent({n: v.value for n, v in layer.items()}, origin, spelt)
    return layer


def _unknown(key: str, value: Any, origin: str, known: Collection[str]) -> SettingError:
    if key in RETIRED_KNOBS:
        return SettingError(key, value, origin, RETIRED_KNOBS[key])
    return SettingError(key, value, origin, "unknown key", nearest(key, known))


def _name(key: Any) -> str:
    """A key of a mapping as a field name; YAML allows keys of any type."""
    return key if isinstance(key, str) else shown(key)


def _known_keys(secondary: bool) -> list[str]:
    names = [name for name, knob in KNOBS.items() if knob.per_transformer or not secondary]
    return [*names, *(alias for alias, name in ALIASES.items() if name in names), *INERT_KNOBS]


def read_file(path_or_mapping: str | Mapping[str, Any]) -> FileConfig:
    """Settings of a config file, or of the mapping that the offline engine takes in its place."""
    raw = path_or_mapping if isinstance(path_or_mapping, Mapping) else load_file(str(path_or_mapping))
    label = file_label(path_or_mapping)
    if not isinstance(raw, Mapping):
        raise SettingError("--cache-dit-config", raw, label, f"expected sections {', '.join(FILE_SECTIONS)}")
    sections = [*FILE_SECTIONS, "parallel_kwargs"]
    for key in raw:
        if key not in sections:
            raise SettingError(_name(key), raw[key], label, "unknown section", nearest(_name(key), sections))
    warnings: list[str] = []
    profiles = _read_profiles(raw.get("profiles"), label, warnings)
    # Profiles alone are only there to be named.
    enabled = Value(True, label) if raw.get("cache_config") is not None else None
    if (profile := raw.get("profile")) is not None and not (isinstance(profile, str) and profile):
        raise SettingError("profile", profile, label, "expected the name of a profile")
    primary, secondary = ({} if raw.get(key) is None else raw[key] for key in ("cache_config", "secondary"))
    source = Source(
        primary=read_layer(primary, f"{label} cache_config", warnings),
        secondary=read_layer(secondary, f"{label} secondary", warnings, secondary=True),
        enabled=enabled, implied=Value(True, label) if profile else None, profile=profile, profile_origin=label,
    )
    check_method(source)
    passed_on = read_sections(raw, label, warnings)
    return FileConfig(
        source=source, profiles=profiles, passed_on=passed_on, warnings=tuple(warnings),
        given=path_or_mapping,
    )


def _read_profiles(raw: Any, label: str, warnings: list[str]) -> dict[str, Source]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise SettingError("profiles", raw, label, "expected a mapping of profile name to settings")
    return {
        name: read_request(knobs, origin=f"{label} profiles.{name}", warnings=warnings)
        for key, knobs in raw.items()
        if (name := profile_name(key, label))
    }


def profile_name(key: Any, origin: str) -> str:
    """A key of ``profiles``; reports and answers carry it, so it has to be text that can be shown."""
    name = _name(key)
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise SettingError("profiles", name, origin, f"a profile's name is 1 to {MAX_NAME} printable characters")
    return name


def read_request(
    raw: Any, *, origin: str = REQUEST, warnings: list[str] | None = None,
    profiles: Collection[str] | None = (),
) -> Source:
    """Settings of one request's ``cache_dit_params``.

    Args:
        profiles: names that ``profile`` may take.
    """
    if raw is None:
        return Source()
    warnings = [] if warnings is None else warnings
    primary = read_layer(raw, origin, warnings, extra=("secondary", "profile"))
    secondary = raw.get("secondary")
    profile = raw.get("profile")
    if profile is not None and not (isinstance(profile, str) and profile in (profiles or ())):
        choices = ", ".join(sorted(profiles or ())) or "none is defined"
        raise SettingError(
            "profile", profile, origin, f"expected one of: {choices}", nearest(_name(profile), profiles or ())
        )
    layer = {} if secondary is None else read_layer(
        secondary, f"{origin}.secondary", warnings, secondary=True
    )
    source = Source(primary=primary, secondary=layer, profile=profile, profile_origin=origin)
    check_method(source)
    return source


def check_method(source: Source, profile: Source | None = None) -> None:
    """Refuse an error tolerance beside settings that it leaves without effect.

    Args:
        profile: the one that ``source`` names.
    """
    own, named = (each and each.primary.get("error_tolerance") for each in (source, profile))
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
    strongest_first = _one_method(strongest_first)
    primary = [source.primary for source in strongest_first]
    secondary = [layer for source in strongest_first for layer in (source.secondary, source.primary)]
    settings, origins = _merge(primary)
    settings_2, origins_2 = _merge(secondary)
    profile = next((source.profile for source in strongest_first if source.profile), None)
    return Resolved(
        primary=settings, secondary=settings_2, origins=origins, secondary_origins=origins_2, profile=profile
    )


def _one_method(strongest_first: Sequence[Source]) -> tuple[Source, ...]:
    """The sources without what the strongest one leaves without effect that names a tolerance or DBCache's settings."""
    for index, source in enumerate(strongest_first):
        tolerance, other = source.primary.get("error_tolerance"), source.dbcache()
        if tolerance is None and other is None:
            continue
        weaker = strongest_first[index + 1 :]
        if tolerance is None:
            if not any("error_tolerance" in each.primary for each in weaker):
                break
            tolerance = Value(None, other.origin)
            rest = [_without({"error_tolerance"}, each) for each in weaker]
            decided = replace(source, primary={**source.primary, "error_tolerance": tolerance})
            return (*strongest_first[:index], decided, *rest)
        if tolerance.value is not None:
            return (*strongest_first[: index + 1], *(_without(DBCACHE_KNOBS, each) for each in weaker))
        break
    return tuple(strongest_first)


def _without(names: Collection[str], source: Source) -> Source:
    primary, secondary = (
        {name: value for name, value in layer.items() if name not in names}
        for layer in (source.primary, source.secondary)
    )
    return replace(source, primary=primary, secondary=secondary)


def _merge(layers: list[Layer]) -> tuple[CacheSettings, dict[str, str]]:
    values: dict[str, Any] = {}
    origins = {f.name: "default" for f in fields(CacheSettings)}
    # A schedule, and the choice of a calibrator, are taken whole from the strongest source
    # that speaks of them: the request's preset must not meet the environment's bins.
    for group in ({name} for name in KNOBS if name not in SCHEDULE_KNOBS | CALIBRATOR_KNOBS):
        _take(group, layers, values, origins)
    _take(SCHEDULE_KNOBS, layers, values, origins)
    _take(CALIBRATOR_KNOBS, layers, values, origins)
    return CacheSettings(**values), origins


def _take(
    group: Collection[str], layers: list[Layer], values: dict[str, Any], origins: dict[str, str]
) -> None:
    for layer in layers:
        given = [name for name in group if name in layer]
        for name in given:
            values[name] = layer[name].value
            origins[name] = layer[name].origin
        if given:
            return
