"""Which row describes a class."""

from __future__ import annotations

from . import third_party
from .diffusers_rows import DIFFUSERS
from .native import NATIVE
from .row import AdapterRow


def find_row(cls: type) -> AdapterRow | None:
    """The row of a class or of its nearest base that has one; rows from outside outrank those that ship.

    A class of diffusers and one of SGLang may share a name and differ in everything else: the module decides.
    """
    outside = third_party.load()
    for base in cls.__mro__:
        table = DIFFUSERS if base.__module__.split(".")[0] == "diffusers" else NATIVE
        row = outside.find(base) or table.get(base.__name__)
        if row is not None:
            return row
    return None
