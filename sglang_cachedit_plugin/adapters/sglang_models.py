"""SGLang's own model classes, all of 0.5.23's registry.

Their loops are kept (``streams``): most of them pass other arguments to each block or do more than call them.
A class whose block overwrites its input says so; the mount probe finds those that do not say it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from .table import Blocks, ModelAdapter

_CHUNKED = (
    "it is sampled chunk by chunk in a few steps, and each block's keys and values are what the next chunk reads"
)
_TEXTURE = "a UNet with skip connections over its whole depth, in a texture stage with a loop of its own"
_TOWERS = "its stage walks the blocks of the video and the audio tower itself"
_NO_DIT = "no diffusion transformer: it runs once a request, outside the denoising loop"


def _blocks(name: str, *streams: str, **more: Any) -> Blocks:
    return Blocks(name=name, streams=streams, **more)


_row = partial(ModelAdapter, verified="run")
_DOUBLE = ("hidden_states", "encoder_hidden_states")
_TEXT_FIRST = ("encoder_hidden_states", "hidden_states")

NATIVE: dict[str, ModelAdapter] = {
    # image
    "FluxTransformer2DModel": _row(
        family="FLUX.1",
        blocks=(
            _blocks("transformer_blocks", *_TEXT_FIRST),
            _blocks("single_transformer_blocks", *_TEXT_FIRST, shares_decision=True),
        ),
        cfg="none", note="with true_cfg_scale one forward for each branch",
    ),
    "Flux2Transformer2DModel": _row(
        family="FLUX.2",
        blocks=(
            _blocks("transformer_blocks", *_TEXT_FIRST, materialize="_materialize_gated_residual"),
            _blocks("single_transformer_blocks", "hidden_states", materialize="_materialize_gated_residual"),
        ),
        cfg="none", note="two decisions a step; the undistilled klein-base runs one forward for each branch",
    ),
    "Flux3ImageDiT": _row(
        family="FLUX.3 image", blocks=(_blocks("single_blocks", "x"),), cfg="batched",
        note="the per-modality blocks before the joint trunk always run; both branches share one decision",
    ),
    "QwenImageTransformer2DModel": _row(
        family="Qwen-Image, Qwen-Image-Edit",
        blocks=(_blocks("transformer_blocks", *_TEXT_FIRST),),
    ),
    "QwenImage21Transformer2DModel": _row(
        family="Qwen-Image 2.1", blocks=(_blocks("transformer_blocks", "hidden_states"),)
    ),
    "ZImageTransformer2DModel": _row(
        family="Z-Image", blocks=(_blocks("layers", "x"),), note="the refiners before the joint trunk always run"
    ),
    "MingImageTransformer2DModel": _row(
        family="Ming-Image", blocks=(_blocks("layers", "x"),), note="the refiners before the joint trunk always run"
    ),
    "GlmImageTransformer2DModel": _row(family="GLM-Image", blocks=(_blocks("transformer_blocks", *_DOUBLE),)),
    "SD3Transformer2DModel": _row(family="Stable Diffusion 3", blocks=(_blocks("transformer_blocks", *_TEXT_FIRST),)),
    "LongCatImageTransformer2DModel": _row(
        family="LongCat-Image",
        blocks=(
            _blocks("transformer_blocks", *_TEXT_FIRST),
            _blocks("single_transformer_blocks", *_TEXT_FIRST, shares_decision=True),
        ),
    ),
    "AnimaTransformer3DModel": _row(family="Anima", blocks=(_blocks("transformer_blocks", "hidden_states"),)),
    "ErnieImageTransformer2DModel": _row(family="ERNIE-Image", blocks=(_blocks("layers", "x"),)),
    "Krea2Transformer2DModel": _row(
        family="Krea 2", blocks=(_blocks("transformer_blocks", "hidden_states"),),
        note="the text fusion before the trunk always runs",
    ),
    "Ideogram4Transformer2DModel": _row(
        family="Ideogram 4", blocks=(_blocks("layers", "x"),), transformers=2, cfg="paired"
    ),
    "SanaTransformer2DModel": _row(family="Sana", blocks=(_blocks("transformer_blocks", "hidden_states"),)),
    "MOSSImageTransformer": _row(
        family="MOSS-Image", blocks=(_blocks("layers", "x"),),
        note="prompts of different length run as groups in one forward; each group decides for itself",
    ),
    "LLaDAImageTransformer2DModel": _row(
        family="LLaDA-Image", blocks=(_blocks("layers", "hidden_states"),),
        note="the refiners before the joint trunk always run",
    ),
    "LLaDAImageQueryFormerModel": ModelAdapter(family="LLaDA-Image", unsupported=_NO_DIT),
    "LLaDAImageTextProjectionModel": ModelAdapter(family="LLaDA-Image", unsupported=_NO_DIT),
    "LLaDAImageSigVQModel": ModelAdapter(family="LLaDA-Image", unsupported=_NO_DIT),
    "HunyuanImage3ForCausalMM": ModelAdapter(
        family="HunyuanImage 3",
        unsupported="its autoregressive stage runs the denoising loop itself and mounts a cache of its own",
    ),
    "JoyTransformer3DModel": _row(family="JoyImage", blocks=(_blocks("double_blocks", "img", "txt"),)),
    "JoyImageEditTransformer3DModel": _row(family="JoyImage Edit", blocks=(_blocks("double_blocks", "img", "txt"),)),
    # video
    "WanTransformer3DModel": _row(
        family="Wan 2.1, Wan 2.2", blocks=(_blocks("blocks", "hidden_states"),), transformers=2
    ),
    "WanAnimate2Transformer3DModel": _row(
        family="Wan-Animate 2", blocks=(_blocks("blocks", "hidden_states"),),
        note="each clip starts anew; block 9 is left out of the unconditional branch by the model itself",
    ),
    "HunyuanVideoTransformer3DModel": _row(
        family="HunyuanVideo",
        blocks=(_blocks("double_blocks", "img", "txt"), _blocks("single_blocks", "x")),
        cfg="none", note="two decisions a step",
    ),
    "LTX2VideoTransformer3DModel": _row(
        family="LTX-2", blocks=(_blocks("transformer_blocks", "hidden_states", "audio_hidden_states"),),
        cfg="batched", note="video and audio are forecast together, the decision is video's; samplers or guidance "
        "that run several forwards a step are computed",
    ),
    "Cosmos3OmniTransformer": _row(
        family="Cosmos 3", blocks=(_blocks("gen_layers", "hidden_states", "residual"),),
        note="the text pathway runs once a request",
    ),
    "Cosmos3MultiviewTransformer": _row(
        family="Cosmos 3 multiview", blocks=(_blocks("gen_layers", "hidden_states", "residual"),)
    ),
    "Kandinsky6Transformer3DModel": _row(
        family="Kandinsky 6",
        blocks=(
            _blocks("visual_transformer_blocks", "vis", "aud"),
            _blocks("visual_transformer_blocks", "visual_embed"),
        ),
        note="with audio both streams are forecast together; the text blocks always run",
    ),
    "Kandinsky6SRTransformer3DModel": _row(
        family="Kandinsky 6 SR", blocks=(_blocks("visual_transformer_blocks", "visual_embed"),), cfg="none"
    ),
    "MiniMaxH3DiTModel": _row(family="MiniMax-H3", blocks=(_blocks("blocks", "x", in_place=True),), cfg="none"),
    "LingBotVideoTransformer3DModel": _row(family="LingBot-Video", blocks=(_blocks("blocks", "x"),)),
    "LingBotWorldTransformer3DModel": _row(
        family="LingBot-World", blocks=(_blocks("blocks", "hidden_states"),), transformers=2
    ),
    "SanaVideoTransformer3DModel": _row(family="Sana-Video", blocks=(_blocks("transformer_blocks", "hidden_states"),)),
    "SanaVideo2Transformer3DModel": _row(
        family="Sana-Video 2", cfg="batched",
        output_only="every block attends to the outputs of all blocks before it, so the middle cannot be left out",
    ),
    "SanaWMTransformer3DModel": _row(
        family="Sana-WM", blocks=(_blocks("blocks", "x"),), cfg="batched", note="the streaming variant is not cached"
    ),
    "SanaWMLTX2VideoRefiner": ModelAdapter(
        family="Sana-WM refiner", unsupported="a distilled model of a few steps, sampled in a loop of its own"
    ),
    "HeliosTransformer3DModel": ModelAdapter(
        family="Helios", unsupported="its loop says neither the step nor the branch of a forward, and starts anew with "
        "each chunk",
    ),
    "Flux3Transformer": ModelAdapter(
        family="FLUX.3 action", unsupported="its stage calls the parts of the model one by one, not its forward"
    ),
    "WanModel": ModelAdapter(family="MOVA video", unsupported=_TOWERS),
    "WanAudioModel": ModelAdapter(family="MOVA audio", unsupported=_TOWERS),
    "CausalWanTransformer3DModel": ModelAdapter(family="Causal Wan (Self-Forcing)", unsupported=_CHUNKED),
    "LongLive2Transformer3DModel": ModelAdapter(family="LongLive 2", unsupported=_CHUNKED),
    "CausalLingBotWorldTransformer3DModel": ModelAdapter(family="LingBot-World causal", unsupported=_CHUNKED),
    "NomasTransformer3DModel": ModelAdapter(family="Nomas", unsupported=_CHUNKED),
    "CosmosDreamsTransformer": ModelAdapter(family="Cosmos-Dreams", unsupported=_CHUNKED),
    "Cosmos3SimAutoTransformer": ModelAdapter(family="Cosmos 3 Sim", unsupported=_CHUNKED),
    # 3D
    "Hunyuan3D2DiT": _row(
        family="Hunyuan3D 2 shape",
        blocks=(_blocks("double_blocks", "img", "txt"), _blocks("single_blocks", "x")),
        cfg="batched", note="two decisions a step",
    ),
    "Hunyuan3DPaintUNet": ModelAdapter(family="Hunyuan3D 2 paint", unsupported=_TEXTURE),
    "StableDiffusionUNet2DConditionModel": ModelAdapter(family="Hunyuan3D 2 paint", unsupported=_TEXTURE),
}
