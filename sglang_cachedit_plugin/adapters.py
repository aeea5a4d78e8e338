"""Model classes whose blocks cache-dit's own register does not describe, or describes wrongly.

A row names the block lists of a class and the forward pattern of their blocks (cache-dit's numbering:
0 returns hidden then encoder states, 1 encoder then hidden, 2 takes both and returns hidden, 3 to 5 take
hidden states only). Classes without a row are looked up in cache-dit's register.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AdapterRow:
    """One model class."""

    family: str
    blocks: tuple[str, ...]
    patterns: tuple[int, ...]
    note: str = ""


TABLE: dict[str, AdapterRow] = {
    "AnimaTransformer3DModel": AdapterRow(family="Anima", blocks=("transformer_blocks",), patterns=(3,)),
    "MingImageTransformer2DModel": AdapterRow(family="Ming-Image", blocks=("layers",), patterns=(3,)),
    "QwenImage21Transformer2DModel": AdapterRow(
        family="Qwen-Image 2.1", blocks=("transformer_blocks",), patterns=(3,)
    ),
    "ErnieImageTransformer2DModel": AdapterRow(family="ERNIE-Image", blocks=("layers",), patterns=(3,)),
    "Krea2Transformer2DModel": AdapterRow(family="Krea 2", blocks=("transformer_blocks",), patterns=(3,)),
    "MiniMaxH3DiTModel": AdapterRow(family="MiniMax-H3", blocks=("blocks",), patterns=(3,)),
    "Flux3ImageDiT": AdapterRow(
        family="FLUX.3", blocks=("single_blocks",), patterns=(3,),
        note="the per-modality blocks before the joint trunk always run",
    ),
    "Ideogram4Transformer2DModel": AdapterRow(family="Ideogram 4", blocks=("layers",), patterns=(3,)),
}


def find_row(class_names: list[str]) -> AdapterRow | None:
    """The row of the first name that has one; ``class_names`` in method resolution order."""
    return next((TABLE[name] for name in class_names if name in TABLE), None)
