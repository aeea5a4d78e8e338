"""Model classes and their blocks: what can be cached in each, or why nothing can.

``native.py`` holds SGLang's own classes, ``diffusers_rows.py`` those of diffusers, ``THIRD_PARTY`` rows from
outside. Adding a model is one row there and one case in tests/models.
"""

from .lookup import DIFFUSERS, NATIVE, THIRD_PARTY, find_row
from .row import AdapterRow, Blocks

__all__ = ["DIFFUSERS", "NATIVE", "THIRD_PARTY", "AdapterRow", "Blocks", "find_row"]
