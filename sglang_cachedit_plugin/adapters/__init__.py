"""Model classes and their blocks: what can be cached in each, or why nothing can.

``sglang_models`` holds SGLang's own classes, ``diffusers_models`` those of diffusers, ``entry_points`` reads rows from
outside. Adding a model is one row there and one case in tests/models.
"""

from . import entry_points
from .diffusers_models import DIFFUSERS
from .sglang_models import NATIVE
from .table import Blocks, ModelAdapter

__all__ = ["DIFFUSERS", "NATIVE", "Blocks", "ModelAdapter", "find_adapter"]


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
