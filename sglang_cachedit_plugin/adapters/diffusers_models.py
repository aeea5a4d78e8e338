"""Classes of diffusers 0.37, every one that a pipeline takes as ``transformer``.

All lists keep the model's own loop (``streams``): control residuals, face adapters, skip connections and identity
attention are added between blocks, which a list that stands in for the whole loop would leave out without a word.
"""

from __future__ import annotations

from .table import Blocks, Cfg, ModelAdapter


def _hidden(name: str, stream: str = "hidden_states") -> Blocks:
    """Blocks that take and return hidden states."""
    return Blocks(name=name, streams=(stream,))


def _both(name: str, *, shares_decision: bool = False) -> Blocks:
    """Blocks that return hidden, then encoder states."""
    return Blocks(name=name, streams=("hidden_states", "encoder_hidden_states"), shares_decision=shares_decision)


def _encoder_first(name: str, *, shares_decision: bool = False) -> Blocks:
    """Blocks that return encoder, then hidden states."""
    return Blocks(name=name, streams=("encoder_hidden_states", "hidden_states"), shares_decision=shares_decision)


def _row(family: str, *blocks: Blocks, cfg: Cfg = "batched", note: str = "", transformers: int = 1) -> ModelAdapter:
    return ModelAdapter(family=family, blocks=blocks, cfg=cfg, note=note, transformers=transformers, verified="run")


_FLUX = (_encoder_first("transformer_blocks"), _encoder_first("single_transformer_blocks", shares_decision=True))
_HUNYUAN = (_both("transformer_blocks"), _both("single_transformer_blocks", shares_decision=True))
_FLUX_APART = (_encoder_first("transformer_blocks"), _hidden("single_transformer_blocks"))

DIFFUSERS: dict[str, ModelAdapter] = {
    # image
    "FluxTransformer2DModel": _row("FLUX.1, Kontext, Fill, Control, ControlNet, VisualCloze", *_FLUX, cfg="separate"),
    "Flux2Transformer2DModel": _row("FLUX.2", *_FLUX_APART, cfg="separate"),
    "ChromaTransformer2DModel": _row("Chroma", *_FLUX_APART, cfg="separate"),
    "BriaTransformer2DModel": _row("Bria 3.2", *_FLUX),
    "BriaFiboTransformer2DModel": _row("Bria Fibo", *_FLUX_APART),
    "LongCatImageTransformer2DModel": _row("LongCat-Image", *_FLUX, cfg="separate"),
    "OvisImageTransformer2DModel": _row("Ovis-Image", *_FLUX, cfg="separate"),
    "QwenImageTransformer2DModel": _row(
        "Qwen-Image, Edit, Edit-Plus, Layered, ControlNet", _encoder_first("transformer_blocks"), cfg="separate"
    ),
    "SD3Transformer2DModel": _row(
        "Stable Diffusion 3 and 3.5, ControlNet", _encoder_first("transformer_blocks"),
        note="with skip-layer guidance a third forward has the same name as the second: those steps are computed",
    ),
    "SanaTransformer2DModel": _row("Sana, Sana Sprint, ControlNet", _hidden("transformer_blocks")),
    "PixArtTransformer2DModel": _row("PixArt-alpha, PixArt-Sigma", _hidden("transformer_blocks")),
    "DiTTransformer2DModel": _row("DiT", _hidden("transformer_blocks")),
    "AuraFlowTransformer2DModel": _row(
        "AuraFlow", _encoder_first("joint_transformer_blocks"), _hidden("single_transformer_blocks")
    ),
    "CogView3PlusTransformer2DModel": _row("CogView3-Plus", _both("transformer_blocks")),
    "CogView4Transformer2DModel": _row("CogView4", _both("transformer_blocks"), cfg="separate"),
    "GlmImageTransformer2DModel": _row("GLM-Image", _both("transformer_blocks"), cfg="separate"),
    "HiDreamImageTransformer2DModel": _row(
        "HiDream-I1", _both("double_stream_blocks"), _hidden("single_stream_blocks")
    ),
    "HunyuanDiT2DModel": _row(
        "Hunyuan-DiT, ControlNet", Blocks(name="blocks", streams=("hidden_states",), mirrored=True),
        note="its last blocks take what its first ones made: B must not exceed F",
    ),
    "HunyuanImageTransformer2DModel": _row("HunyuanImage 2.1 and its refiner", *_HUNYUAN, cfg="separate"),
    "LuminaNextDiT2DModel": _row("Lumina-Next", _hidden("layers")),
    "Lumina2Transformer2DModel": _row("Lumina 2", _hidden("layers"), cfg="separate"),
    "OmniGenTransformer2DModel": _row("OmniGen", _hidden("layers")),
    "PRXTransformer2DModel": _row("PRX", _hidden("blocks")),
    "ZImageTransformer2DModel": _row("Z-Image, Omni, ControlNet", _hidden("layers", "x")),
    "UVit2DModel": _row("aMUSEd", _hidden("transformer_layers"), note="tokens, not latents"),
    "Transformer2DModel": ModelAdapter(
        family="VQ-Diffusion", unsupported="it samples discrete tokens, and diffusers has deprecated it", cfg="batched"
    ),
    # video
    "WanTransformer3DModel": _row("Wan 2.1 and 2.2, Lucy Edit", _hidden("blocks"), cfg="separate", transformers=2),
    "ChronoEditTransformer3DModel": _row("ChronoEdit", _hidden("blocks"), cfg="separate"),
    "SkyReelsV2Transformer3DModel": _row(
        "SkyReels-V2", _hidden("blocks"), cfg="separate",
        note="diffusion forcing moves each frame by its own schedule: its steps cannot be told apart, all are computed",
    ),
    "WanVACETransformer3DModel": _row(
        "Wan VACE", _hidden("blocks"), cfg="separate", transformers=2, note="the control blocks always run"
    ),
    "WanAnimateTransformer3DModel": _row(
        "Wan Animate", _hidden("blocks"), cfg="separate", note="the face adapters always run"
    ),
    "HeliosTransformer3DModel": _row("Helios", _hidden("blocks"), cfg="separate"),
    "HunyuanVideoTransformer3DModel": _row("HunyuanVideo, SkyReels-V1", *_HUNYUAN, cfg="separate"),
    "HunyuanVideoFramepackTransformer3DModel": _row("FramePack", *_HUNYUAN, cfg="separate"),
    "HunyuanVideo15Transformer3DModel": _row("HunyuanVideo 1.5", _both("transformer_blocks"), cfg="separate"),
    "LTXVideoTransformer3DModel": _row("LTX-Video", _hidden("transformer_blocks")),
    "LTX2VideoTransformer3DModel": _row(
        "LTX-2", Blocks(name="transformer_blocks", streams=("hidden_states", "audio_hidden_states"))
    ),
    "CogVideoXTransformer3DModel": _row("CogVideoX", _both("transformer_blocks")),
    "ConsisIDTransformer3DModel": _row(
        "ConsisID", _both("transformer_blocks"), note="the identity attention between the blocks always runs"
    ),
    "MochiTransformer3DModel": _row("Mochi 1", _both("transformer_blocks")),
    "AllegroTransformer3DModel": _row("Allegro", _hidden("transformer_blocks")),
    "LatteTransformer3DModel": _row(
        "Latte", _hidden("transformer_blocks"), note="the temporal blocks between the spatial ones always run"
    ),
    "EasyAnimateTransformer3DModel": _row("EasyAnimate", _both("transformer_blocks")),
    "SanaVideoTransformer3DModel": _row("Sana Video", _hidden("transformer_blocks")),
    "CosmosTransformer3DModel": _row(
        "Cosmos 1, Predict 2 and 2.5, Transfer 2.5", _hidden("transformer_blocks"), cfg="separate"
    ),
    "Kandinsky5Transformer3DModel": _row(
        "Kandinsky 5", _hidden("visual_transformer_blocks", "visual_embed"), cfg="separate",
        note="the text blocks always run",
    ),
    "StableAudioDiTModel": _row("Stable Audio", _hidden("transformer_blocks")),
}
