"""SGLang's own model classes."""

from __future__ import annotations

from .row import AdapterRow, Blocks

NATIVE: dict[str, AdapterRow] = {
    "AnimaTransformer3DModel": AdapterRow(family="Anima", blocks=(Blocks(name="transformer_blocks", pattern=3),)),
    "MingImageTransformer2DModel": AdapterRow(family="Ming-Image", blocks=(Blocks(name="layers", pattern=3),)),
    "QwenImage21Transformer2DModel": AdapterRow(
        family="Qwen-Image 2.1", blocks=(Blocks(name="transformer_blocks", pattern=3),)
    ),
    "ErnieImageTransformer2DModel": AdapterRow(family="ERNIE-Image", blocks=(Blocks(name="layers", pattern=3),)),
    "Krea2Transformer2DModel": AdapterRow(family="Krea 2", blocks=(Blocks(name="transformer_blocks", pattern=3),)),
    "MiniMaxH3DiTModel": AdapterRow(family="MiniMax-H3", blocks=(Blocks(name="blocks", pattern=3),)),
    "Flux3ImageDiT": AdapterRow(
        family="FLUX.3", blocks=(Blocks(name="single_blocks", pattern=3),),
        note="the per-modality blocks before the joint trunk always run",
    ),
    "Ideogram4Transformer2DModel": AdapterRow(
        family="Ideogram 4", blocks=(Blocks(name="layers", pattern=3),), cfg="paired", transformers=2
    ),
}
