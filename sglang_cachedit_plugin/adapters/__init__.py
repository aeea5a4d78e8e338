"""Model classes and their blocks: what can be cached in each, or why nothing can.

``native.py`` holds SGLang's own classes, ``diffusers_rows.py`` those of diffusers, ``third_party.py`` reads rows from
outside. Adding a model is one row there and one case in tests/models.
"""

from .diffusers_models import DIFFUSERS
from .lookup import find_adapter
from .sglang_models import NATIVE
from .table import Blocks, ModelAdapter

__all__ = ["DIFFUSERS", "NATIVE", "Blocks", "ModelAdapter", "find_adapter"]
