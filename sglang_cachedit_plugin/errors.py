"""Errors that say in one line what was wrong, where it came from and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_LINE = 2000
"""Longest message: whatever is quoted in one, a log stays readable."""


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
        line = f"{_shorten(self.field)} = {shown(self.value)} ({self.origin}): {self.allowed}"
        if self.near:
            line += f"; did you mean {self.near!r}?"
        return one_line(line)


class Reason(str):
    """Why a request is not cached, or only in part: a sentence that carries its code.

    Args:
        code: a key of ``report.reasons.REASONS``; docs/troubleshooting.md says of each what to do.
    """

    code: str

    def __new__(cls, code: str, text: object) -> Reason:
        made = super().__new__(cls, text)
        made.code = code
        return made

    def __reduce__(self) -> tuple[type[Reason], tuple[str, str]]:
        return Reason, (self.code, str(self))

    def after(self, prefix: str) -> Reason:
        """The same with ``prefix`` in front of it."""
        return Reason(self.code, f"{prefix}: {self}")


def reason_of(text: object, code: str) -> Reason:
    """``text``, or the message of an exception, with the code that it carries; with ``code`` where it carries none."""
    given = text.args[0] if isinstance(text, Exception) and text.args else text
    return given if isinstance(given, Reason) else Reason(code, str(text) or type(text).__name__)


class MountError(CacheDitError):
    """A transformer whose blocks cannot be cached; the message is the reason."""


_REFUSAL = "cache-dit refuses the request: "


class RefusedError(MountError, ValueError):
    """A request whose settings a worker cannot use; known before anything of it is computed.

    What comes back from a worker is the text of its error, so the text itself says that this is a refusal.

    Args:
        why: what is wrong with the request, in one line.
    """

    def __init__(self, why: SettingError | str):
        super().__init__(f"{_REFUSAL}{why}")


def refusal_in(text: str) -> str | None:
    """Why a worker refused a request, from the text of its error; None where that says something else."""
    _, found, reason = text.partition(_REFUSAL)
    return one_line(reason) if found else None


class HostContractError(CacheDitError):
    """A hook point of the host that is not what this plugin was built against."""


def shown(value: object) -> str:
    """``value`` as an error shows it, shortened; whatever it is, this does not fail."""
    try:
        return _shorten(repr(value))
    except (ValueError, RecursionError):
        # Python does not print integers of thousands of digits, nor lists nested a thousand deep.
        return f"<{type(value).__name__}>"


def _shorten(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def one_line(text: object) -> str:
    """``text`` as one line of a log, whatever is quoted in it: it cannot look like several."""
    return _shorten(printable(" ".join(str(text).split())), MAX_LINE)


def printable(text: str) -> str:
    """``text`` with control characters and lone surrogates escaped, safe for logs and for UTF-8."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``name``, or None when nothing is close."""
    if len(str(name)) > 100:
        return None
    known = list(known)
    folded = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(str(name).lower(), folded, n=1, cutoff=0.75)
    return folded[matches[0]] if matches else None
