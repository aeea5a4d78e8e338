"""Which row describes a class."""

from __future__ import annotations

from . import entry_points
from .diffusers_models import DIFFUSERS
from .sglang_models import NATIVE
from .table import ModelAdapter


def find_adapter(cls: type) -> ModelAdapter | None:
    """The row of a class or of its nearest base that has one; rows from outside outrank those that ship.

    A class of diffusers and one of SGLang may share a name and differ in everything else: the module decides.
    """
    outside = entry_points.load()
    for base in cls.__mro__:
        table = DIFFUSERS if base.__module__.split(".")[0] == "diffusers" else NATIVE
        row = outside.find(base) or table.get(base.__name__)
        if row is not None:
            return row
    return None
