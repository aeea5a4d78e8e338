"""Errors that say in one line what was wrong, where it came from and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CacheDitError(Exception):
    """Anything this plugin refuses to do."""


class SettingError(CacheDitError, ValueError):
    """A setting that cannot be used.

    Args:
        field: name of the setting as the user knows it.
        value: what was given.
        origin: where it was given, e.g. ``SGLANG_CACHE_DIT_RDT`` or ``cache.yaml``.
        allowed: what would have been accepted.
        near: a known name close to the one given, if any.
    """

    def __init__(self, field: str, value: object, origin: str, allowed: str, near: str | None = None):
        self.field = field
        self.value = value
        self.origin = origin
        self.allowed = allowed
        self.near = near
        super().__init__(self._line())

    def _line(self) -> str:
        shown = repr(self.value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        line = f"{self.field} = {shown} ({self.origin}): {self.allowed}"
        if self.near:
            line += f"; did you mean {self.near!r}?"
        return " ".join(line.split())


class MountError(CacheDitError):
    """A transformer whose blocks cannot be cached; the message is the reason."""


class HostContractError(CacheDitError):
    """A seam of the host that is not what this plugin was built against."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``name``, or None when nothing is close."""
    known = list(known)
    folded = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(str(name).lower(), folded, n=1, cutoff=0.75)
    return folded[matches[0]] if matches else None
