"""Which row describes a class."""

from __future__ import annotations

from .diffusers_rows import DIFFUSERS
from .native import NATIVE
from .row import AdapterRow

THIRD_PARTY: dict[str, AdapterRow] = {}
"""Rows from outside, by class name; they outrank the others."""


def find_row(cls: type) -> AdapterRow | None:
    """The row of a class or of its nearest base that has one.

    A class of diffusers and one of SGLang may share a name and differ in everything else: the module decides.
    """
    for base in cls.__mro__:
        table = DIFFUSERS if base.__module__.split(".")[0] == "diffusers" else NATIVE
        row = THIRD_PARTY.get(base.__name__) or table.get(base.__name__)
        if row is not None:
            return row
    return None
