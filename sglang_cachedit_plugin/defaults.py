"""The server's settings: environment and file, and what a request makes of them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .profiles import BUILT_IN
from .sources import FileConfig, Resolved, Source, Value, read_request, resolve


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether a request is cached, why not, and with which settings."""

    enabled: bool
    reason: str | None
    resolved: Resolved


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Settings in force before a request speaks."""

    environment: Source = field(default_factory=Source)
    file: FileConfig = field(default_factory=FileConfig)

    @property
    def enabled(self) -> bool:
        """Whether requests that say nothing are cached; the file outranks the environment."""
        return self.switch.value

    @property
    def switch(self) -> Value:
        """The same with its origin."""
        for source in (self.file.source, self.environment):
            if source.enabled is not None:
                return source.enabled
        return Value(False, "default")

    @property
    def profiles(self) -> Mapping[str, Source]:
        """Profiles by name; the file's replace built-in ones of the same name."""
        return {**BUILT_IN, **self.file.profiles}

    def describe(self) -> dict[str, Any]:
        """The settings that a request without parameters meets, with their origins."""
        return {
            "enabled": {"value": self.switch.value, "origin": self.switch.origin},
            "config": self.decide(None, None).resolved.config(),
            "profiles": sorted(self.profiles),
        }

    def decide(self, enable: bool | None, params: Mapping[str, Any] | None) -> Decision:
        """Settings of a request with ``enable_cache_dit`` and ``cache_dit_params``.

        Raises:
            SettingError: a parameter that cannot be used.
        """
        request = read_request(params, profiles=self.profiles)
        profile = self.profiles[request.profile] if request.profile else Source()
        resolved = resolve(request, profile, self.file.source, self.environment)
        enabled = self.enabled if enable is None else enable
        return Decision(enabled=enabled, reason=self._why_off(enable, enabled), resolved=resolved)

    @staticmethod
    def _why_off(enable: bool | None, enabled: bool) -> str | None:
        if enabled:
            return None
        return "request" if enable is False else "not configured"


_lock = threading.Lock()
_current = Defaults()


def current() -> Defaults:
    """The settings of this process."""
    return _current


def install(defaults: Defaults) -> None:
    """Replace the settings of this process."""
    global _current
    with _lock:
        _current = defaults
