"""Rows that other distributions bring, through the entry point group ``sglang_cachedit_plugin.adapters``.

An entry point names a mapping from class names to rows, or a callable that returns one. A name may be bare
(``MyTransformer``) or with its module (``my_package.models.MyTransformer``). Nothing is imported before the first
model is mounted. An entry point that cannot be used is left out, with one line that says why.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from ..errors import one_line
from .table import ModelAdapter

GROUP = "sglang_cachedit_plugin.adapters"


@dataclass(frozen=True)
class ThirdParty:
    """What the entry points gave: rows by class name, and a line for each thing that could not be used."""

    rows: Mapping[str, ModelAdapter]
    problems: tuple[str, ...] = ()

    def find(self, cls: type) -> ModelAdapter | None:
        """The row of a class itself; the name with its module outranks the bare one."""
        return self.rows.get(f"{cls.__module__}.{cls.__qualname__}") or self.rows.get(cls.__name__)


@functools.lru_cache(maxsize=1)
def load() -> ThirdParty:
    """Rows of all installed distributions, read once. Two rows of one name are both left out."""
    rows: dict[str, ModelAdapter] = {}
    owners: dict[str, list[str]] = {}
    problems = []
    for point in sorted(metadata.entry_points(group=GROUP), key=_owner):
        try:
            found = _read(point)
        except Exception as error:
            # Other people's code ran: whatever it raises is the reason.
            problems.append(one_line(f"{_owner(point)}: {type(error).__name__}: {error}"))
            continue
        for name, row in found.items():
            owners.setdefault(name, []).append(_owner(point))
            rows[name] = row
    for name, given in owners.items():
        if len(given) > 1:
            del rows[name]
            problems.append(f"{name} has rows in {' and in '.join(given)}: none of them is used")
    return ThirdParty(rows, tuple(problems))


def _owner(point: metadata.EntryPoint) -> str:
    owner = point.dist.name if point.dist is not None else "unknown distribution"
    return f"entry point {point.name!r} of {owner}"


def _read(point: metadata.EntryPoint) -> Mapping[str, ModelAdapter]:
    value = point.load()
    found = value() if callable(value) else value
    if not isinstance(found, Mapping):
        raise TypeError(f"expected a mapping from class names to ModelAdapter, found {type(found).__name__}")
    for name, row in found.items():
        if not isinstance(name, str) or not isinstance(row, ModelAdapter):
            raise TypeError(f"{name!r}: expected an ModelAdapter, found {type(row).__name__}")
    return found
