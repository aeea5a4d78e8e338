"""The server's settings: environment, file and live changes, and what a request makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import Reason, SettingError
from .sources import (
    BUILT_IN,
    FileConfig,
    Overrides,
    Resolved,
    Source,
    Value,
    check_method,
    profile_of,
    read_request,
    resolve,
)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether a request is cached, why not, and with which settings."""

    enabled: bool
    reason: str | None
    resolved: Resolved


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Settings in force before a request speaks.

    Args:
        overrides: the live change in force.
        retired: profiles of the change before; a request that was checked then may still arrive.
        change: number of the live change that a worker made last; 0 at start-up.
    """

    environment: Source = field(default_factory=Source)
    file: FileConfig = field(default_factory=FileConfig)
    overrides: Overrides = field(default_factory=Overrides)
    retired: Mapping[str, Source] = field(default_factory=dict)
    change: int = 0

    @property
    def enabled(self) -> bool:
        """Whether requests that say nothing are cached."""
        return bool(self.switch.value)

    @property
    def switch(self) -> Value:
        """The same with its origin."""
        return self._switch(None)

    @property
    def profiles(self) -> Mapping[str, Source]:
        """Profiles by name; live ones replace those of the start-up with the same name."""
        return {**self.start_up_profiles, **self.overrides.profiles}

    @property
    def start_up_profiles(self) -> Mapping[str, Source]:
        """Profiles without the live change's; the file's replace built-in ones of the same name."""
        return {**BUILT_IN, **self.file.profiles}

    def describe(self) -> dict[str, Any]:
        """The settings that a request without parameters meets, with their origins."""
        resolved = self.decide(None, None).resolved
        return {
            "enabled": {"value": self.switch.value, "origin": self.switch.origin},
            "profile": resolved.profile,
            "config": resolved.config(),
            "profiles": sorted(self.profiles),
        }

    def fingerprint(self) -> str:
        """Short name of everything that a request can meet; equal settings have equal names."""
        profiles = [self.profiles[name] for name in sorted(self.profiles)]
        described = repr([self.environment, self.file.source, self.overrides.source, sorted(self.profiles), profiles])
        return hashlib.sha256(described.encode()).hexdigest()[:12]

    def with_overrides(self, overrides: Overrides, change: int = 0) -> Defaults:
        """These settings under another live change; profiles of the present one stay usable once more."""
        return replace(self, overrides=overrides, retired=self.overrides.profiles, change=change)

    def decide(
        self, enable: bool | None, params: Mapping[str, Any] | None, stage: Source | None = None
    ) -> Decision:
        """Settings of a request with ``enable_cache_dit`` and ``cache_dit_params``.

        Args:
            stage: what the host's stage wants by itself; everything that was set outranks it.

        Raises:
            SettingError: a parameter that cannot be used.
        """
        known = {**self.retired, **self.profiles}
        request = read_request(params, profiles=known)
        given = [request, self.overrides.source, self.file.source, self.environment]
        # A profile stands under the source that names it, and in place of those that weaker ones name.
        naming = next((index for index, source in enumerate(given) if source.profile), None)
        profile = Source()
        if naming is not None:
            profile = profile_of(given[naming], known)
            given.insert(naming + 1, profile)
        if request.profile:
            # Those that the server's settings name were checked with them.
            check_method(request, profile)
        resolved = resolve(*given, stage or Source())
        if profile.controls not in (None, resolved.primary.error_tolerance is not None):
            # A stronger source decides the steps in the other way: the profile has no say.
            resolved = replace(resolved, profile=None)
        enabled = self._switch(stage).value if enable is None else enable
        off = Reason("request", "request") if enable is False else Reason("not_configured", "not configured")
        return Decision(enabled=enabled, reason=None if enabled else off, resolved=resolved)

    def _switch(self, stage: Source | None) -> Value:
        """Live changes outrank the file, the file outranks the environment; then come profiles that a start names."""
        start = (self.file.source, self.environment)
        given = [each.enabled for each in (self.overrides.source, *start)]
        given += [Value(True, each.profile_origin) if each.profile else None for each in start]
        given.append((stage or Source()).enabled)
        return next((switch for switch in given if switch is not None), Value(False, "default"))

    def check_profiles(self) -> None:
        """Check the profiles that the environment and the file name, once both are read.

        Raises:
            SettingError: there is no such profile, or it contradicts the settings beside it.
        """
        for source in (self.file.source, self.environment):
            if source.profile:
                check_method(source, profile_of(source, self.start_up_profiles))

    def check(self, fields: Mapping[str, Any]) -> None:
        """Check a request's ``enable_cache_dit`` and ``cache_dit_params`` before any worker hears of it.

        Raises:
            SettingError: one of them cannot be used.
        """
        name = "enable_cache_dit"
        switch = fields.get(name)
        if switch is not None and not isinstance(switch, bool):
            raise SettingError(name, switch, "request", "expected true or false")
        self.decide(switch, fields.get("cache_dit_params"))


_current = Defaults()


def current() -> Defaults:
    """The settings of this process."""
    return _current


def install(defaults: Defaults) -> None:
    """Replace the settings of this process."""
    global _current
    _current = defaults
