"""Versions of the libraries under the plugin: which were tried, and how."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

TRIED = {
    "sglang": {"0.5.21": "read", "0.5.22": "read", "0.5.23": "run"},
    "cache-dit": {"1.5.0": "read", "1.5.1": "run", "1.5.2": "read", "1.5.3": "run"},
}
"""``run``: tests ran against it. ``read``: its source has all that the plugin needs; nothing was run."""


def version(distribution: str) -> str | None:
    """Installed version, None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def untried(installed: Callable[[str], str | None] = version) -> list[str]:
    """A line for each library whose installed version is not in the table."""
    found = {name: installed(name) for name in TRIED}
    return [
        f"{name} {own} was not tried, expected one of: {', '.join(TRIED[name])}"
        for name, own in found.items() if own is not None and own not in TRIED[name]
    ]
