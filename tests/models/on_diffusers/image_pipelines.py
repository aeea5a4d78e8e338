"""Picture pipelines of diffusers around the tiny transformers: prompt embeddings go in, latents come out."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from . import images
from .pipes import PipeCase, embeds, euler, pair, picture, pipe, pooled, square, vae
from .zoo import widen

_NO_PROMPT = {"negative_prompt": None, "use_resolution_binning": False}


def _flux_control(transformer: Any) -> Any:
    torch.manual_seed(5)
    config = {**images.CASES["FluxTransformer2DModel"].config, "num_layers": 2, "num_single_layers": 2}
    control = diffusers.FluxControlNetModel(**config).eval()
    widen(control)
    return control


def _sd3_control(transformer: Any) -> Any:
    torch.manual_seed(5)
    control = diffusers.SD3ControlNetModel.from_transformer(transformer, 2, 0).eval()
    widen(control)
    return control


def _flux(side: int) -> dict[str, Any]:
    # Latents are packed two by two: 8 pixels are 4 tokens a side.
    return {**pair(""), **pooled(), **square(side, 2), "true_cfg_scale": 2.0}


def _flux_picture(side: int) -> dict[str, Any]:
    return {
        "prompt_embeds": embeds(1), "pooled_prompt_embeds": embeds(3)[:, 0], **square(side, 2),
        "image": picture(side * 2), "strength": 0.5,
    }


IMAGES: dict[str, PipeCase] = {
    "FluxPipeline": PipeCase(
        build=pipe("FluxPipeline", "FluxTransformer2DModel", scheduler=euler, vae=lambda: vae(1)),
        call=_flux, branches=("cond", "uncond"),
    ),
    "FluxKontextPipeline": PipeCase(
        build=pipe("FluxKontextPipeline", "FluxTransformer2DModel", scheduler=euler, vae=lambda: vae(1)),
        call=lambda side: {
            **pair(""), **pooled(), **square(side, 2), "image": picture(side * 2), "_auto_resize": False,
            "max_area": (side * 2) ** 2,
        },
        branches=("cond",),
    ),
    "FluxControlNetPipeline": PipeCase(
        build=pipe(
            "FluxControlNetPipeline", "FluxTransformer2DModel", scheduler=euler, vae=lambda: vae(1),
            controlnet=lambda: _flux_control,
        ),
        call=lambda side: {**_flux(side), "true_cfg_scale": 1.0, "control_image": picture(side * 2)},
        branches=("cond",),
    ),
    "StableDiffusion3Pipeline": PipeCase(
        build=pipe("StableDiffusion3Pipeline", "SD3Transformer2DModel", scheduler=euler, vae=lambda: vae(4)),
        call=lambda side: {**pair(""), **pooled(), **square(side, 1)}, branches=("cond",),
    ),
    "StableDiffusion3ControlNetPipeline": PipeCase(
        build=pipe(
            "StableDiffusion3ControlNetPipeline", "SD3Transformer2DModel", scheduler=euler, vae=lambda: vae(4),
            controlnet=lambda: _sd3_control,
        ),
        call=lambda side: {**pair(""), **pooled(), **square(side, 2), "control_image": picture(side * 2)},
        branches=("cond",),
    ),
    "QwenImagePipeline": PipeCase(
        build=pipe("QwenImagePipeline", "QwenImageTransformer2DModel", scheduler=euler),
        call=lambda side: {
            **pair("prompt_embeds_mask"), **square(side, 16), "true_cfg_scale": 2.0,
        },
        branches=("cond", "uncond"),
    ),
    "SanaPipeline": PipeCase(
        build=pipe("SanaPipeline", "SanaTransformer2DModel", scheduler=euler),
        call=lambda side: {**pair(), **_NO_PROMPT, **square(side, 32)}, branches=("cond",),
    ),
    "PixArtSigmaPipeline": PipeCase(
        build=pipe("PixArtSigmaPipeline", "PixArtTransformer2DModel", scheduler=diffusers.DDIMScheduler),
        call=lambda side: {**pair(), **_NO_PROMPT, **square(side, 8)}, branches=("cond",),
    ),
    "AuraFlowPipeline": PipeCase(
        build=pipe("AuraFlowPipeline", "AuraFlowTransformer2DModel", scheduler=euler),
        call=lambda side: {**pair(), **square(side, 8)}, branches=("cond",),
    ),
    "ChromaPipeline": PipeCase(
        build=pipe("ChromaPipeline", "ChromaTransformer2DModel", scheduler=euler, vae=lambda: vae(1)),
        call=lambda side: {**pair(kind=torch.bool), **square(side, 2)}, branches=("cond", "uncond"),
    ),
    "ZImagePipeline": PipeCase(
        build=pipe("ZImagePipeline", "ZImageTransformer2DModel", scheduler=euler, vae=lambda: vae(4)),
        call=lambda side: {
            "prompt_embeds": [embeds(1)[0]], "negative_prompt_embeds": [embeds(2)[0]], **square(side, 2),
        },
        branches=("cond",),
    ),
    "Lumina2Pipeline": PipeCase(
        build=pipe("Lumina2Pipeline", "Lumina2Transformer2DModel", scheduler=euler),
        call=lambda side: {**pair(), **square(side, 8)}, branches=("cond", "uncond"),
    ),
    "CogView4Pipeline": PipeCase(
        build=pipe("CogView4Pipeline", "CogView4Transformer2DModel", scheduler=euler),
        call=lambda side: {**pair(""), **square(side, 8)}, branches=("cond", "uncond"),
    ),
    "HunyuanDiTPipeline": PipeCase(
        build=pipe("HunyuanDiTPipeline", "HunyuanDiT2DModel", scheduler=diffusers.DDPMScheduler),
        call=lambda side: {
            **pair(), **{f"{name}_2": value for name, value in pair().items()}, **square(side, 8),
            "use_resolution_binning": False,
        },
        branches=("cond",),
    ),
    "DiTPipeline": PipeCase(
        build=pipe("DiTPipeline", "DiTTransformer2DModel", scheduler=diffusers.DDIMScheduler, vae=lambda: vae(4)),
        call=lambda side: {"class_labels": [1] * (side // 4)}, branches=("cond",),
    ),
    "FluxImg2ImgPipeline": PipeCase(
        build=pipe("FluxImg2ImgPipeline", "FluxTransformer2DModel", scheduler=euler, vae=lambda: vae(1)),
        call=_flux_picture, branches=("cond",), first=3,
    ),
    "FluxInpaintPipeline": PipeCase(
        build=pipe("FluxInpaintPipeline", "FluxTransformer2DModel", scheduler=euler, vae=lambda: vae(1)),
        call=lambda side: {**_flux_picture(side), "mask_image": torch.ones(1, 1, side * 2, side * 2)},
        branches=("cond",), first=3,
    ),
    "BriaPipeline": PipeCase(
        build=pipe("BriaPipeline", "BriaTransformer2DModel", scheduler=euler, vae=lambda: vae(1)),
        call=lambda side: {**pair(""), **square(side, 2)}, branches=("cond",),
    ),
}
