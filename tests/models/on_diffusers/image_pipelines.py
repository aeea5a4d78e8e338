"""Picture pipelines of diffusers around the tiny transformers: prompt embeddings go in, latents come out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import PIL.Image
import torch

from tests.models.on_diffusers import images
from tests.models.on_diffusers.pipes import (
    NO_PROMPT,
    TEXT,
    PipeCase,
    embeds,
    euler,
    noise,
    pair,
    picture,
    pipe,
    pooled,
    square,
    two_pairs,
    vae,
)
from tests.models.on_diffusers.zoo import widen


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


def _glm_vae() -> Any:
    made = vae(4)
    made.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    return made


def _glm_edit(side: int) -> dict[str, Any]:
    tokens = side * side // 4
    return {
        **pair(""), **square(side, 1), "image": [PIL.Image.new("RGB", (side, side), "red")],
        "prior_token_ids": torch.arange(tokens)[None], "prior_token_image_ids": [torch.arange(tokens)],
        "source_image_grid_thw": [torch.tensor([[1, side // 2, side // 2]])],
    }


def _fibo_prompts(made: Any) -> None:
    """In place of its text encoder, whose hidden states it takes."""
    layers = {"an apple": [noise(seed, 1, TEXT, 8) for seed in range(8)], "": [noise(9, 1, TEXT, 8)] * 8}

    def get_prompt_embeds(prompt: list[str], **_: Any) -> Any:
        states = layers[prompt[0]]
        return torch.cat(states[-2:], dim=-1), states, torch.ones(1, TEXT)

    made.get_prompt_embeds, made.text_encoder = get_prompt_embeds, SimpleNamespace(dtype=torch.float32)


def _longcat_prompts(made: Any) -> None:
    made._encode_prompt = lambda prompt: embeds(2 if prompt == [""] else 1)


def _one_size(made: Any) -> None:
    """It draws every picture with as many pixels."""
    made.default_sample_size = 8


class _OmniGenProcessor:
    """In place of the tokenizer: both prompts of a picture with the places of its tokens."""

    max_image_size = 1024

    def __call__(self, prompt: Any, images: Any, *, height: int, width: int, **_: Any) -> dict[str, Any]:
        length = TEXT + 1 + height * width // 4
        return {
            "input_ids": torch.stack([torch.arange(TEXT), torch.arange(TEXT) + 5]), "input_pixel_values": [],
            "attention_mask": torch.ones(2, length, length), "position_ids": torch.arange(length).expand(2, -1),
            "input_image_sizes": {},
        }


def _omnigen_prompts(made: Any) -> None:
    made.multimodal_processor = _OmniGenProcessor()


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
        call=lambda side: {**pair(), **NO_PROMPT, **square(side, 32)}, branches=("cond",),
    ),
    "PixArtSigmaPipeline": PipeCase(
        build=pipe("PixArtSigmaPipeline", "PixArtTransformer2DModel", scheduler=diffusers.DDIMScheduler),
        call=lambda side: {**pair(), **NO_PROMPT, **square(side, 8)}, branches=("cond",),
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
            **two_pairs(), **square(side, 8), "use_resolution_binning": False,
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
    "StableDiffusion3Img2ImgPipeline": PipeCase(
        build=pipe("StableDiffusion3Img2ImgPipeline", "SD3Transformer2DModel", scheduler=euler, vae=lambda: vae(4)),
        call=lambda side: {**pair(""), **pooled(), **square(side, 1), "image": picture(side), "strength": 0.5},
        branches=("cond",), first=3,
    ),
    "BriaPipeline": PipeCase(
        build=pipe("BriaPipeline", "BriaTransformer2DModel", scheduler=euler, vae=lambda: vae(1)),
        call=lambda side: {**pair(""), **square(side, 2)}, branches=("cond",),
    ),
    "BriaFiboPipeline": PipeCase(
        build=pipe("BriaFiboPipeline", "BriaFiboTransformer2DModel", scheduler=euler, after=_fibo_prompts),
        call=lambda side: {"prompt": "an apple", **square(side, 16)}, branches=("cond",),
    ),
    "Flux2Pipeline": PipeCase(
        build=pipe("Flux2Pipeline", "Flux2Transformer2DModel", scheduler=euler),
        call=lambda side: {"prompt_embeds": embeds(1), **square(side, 16)}, branches=("cond",),
    ),
    "LongCatImagePipeline": PipeCase(
        build=pipe(
            "LongCatImagePipeline", "LongCatImageTransformer2DModel", scheduler=euler, config={"in_channels": 64},
            after=_longcat_prompts,
        ),
        call=lambda side: {**square(side, 16), "prompt": "an apple", "enable_prompt_rewrite": False},
        branches=("cond", "uncond"),
    ),
    "OvisImagePipeline": PipeCase(
        build=pipe("OvisImagePipeline", "OvisImageTransformer2DModel", scheduler=euler),
        call=lambda side: {**pair(""), **square(side, 16), "negative_prompt": None},
        branches=("cond", "uncond"),
    ),
    "CogView3PlusPipeline": PipeCase(
        build=pipe(
            "CogView3PlusPipeline", "CogView3PlusTransformer2DModel", scheduler=diffusers.CogVideoXDDIMScheduler
        ),
        call=lambda side: {**pair(""), **square(side, 8)}, branches=("cond",),
    ),
    "GlmImagePipeline": PipeCase(
        build=pipe("GlmImagePipeline", "GlmImageTransformer2DModel", scheduler=euler, vae=_glm_vae),
        call=_glm_edit, branches=("cond", "uncond"),
    ),
    "HiDreamImagePipeline": PipeCase(
        build=pipe("HiDreamImagePipeline", "HiDreamImageTransformer2DModel", scheduler=euler, after=_one_size),
        call=lambda side: {
            "prompt_embeds_t5": noise(1, 1, TEXT, 8), "prompt_embeds_llama3": noise(2, 2, 1, TEXT, 4),
            "negative_prompt_embeds_t5": noise(3, 1, TEXT, 8),
            "negative_prompt_embeds_llama3": noise(4, 2, 1, TEXT, 4), **pooled(8), **square(side, 8),
        },
        branches=("cond",),
    ),
    "HunyuanImagePipeline": PipeCase(
        build=pipe(
            "HunyuanImagePipeline", "HunyuanImageTransformer2DModel", scheduler=euler,
            guider=lambda: diffusers.AdaptiveProjectedMixGuidance(guidance_scale=2.0),
        ),
        call=lambda side: {**two_pairs("prompt_embeds_mask"), **square(side, 32)}, branches=("cond", "uncond"),
    ),
    "LuminaPipeline": PipeCase(
        build=pipe("LuminaPipeline", "LuminaNextDiT2DModel", scheduler=euler, config={"learn_sigma": True}),
        call=lambda side: {**pair(), **square(side, 8)}, branches=("cond",),
    ),
    "OmniGenPipeline": PipeCase(
        build=pipe(
            "OmniGenPipeline", "OmniGenTransformer2DModel", scheduler=euler, vae=lambda: vae(4),
            after=_omnigen_prompts,
        ),
        call=lambda side: {"prompt": "an apple", **square(side, 1)}, branches=("cond",),
    ),
    "PRXPipeline": PipeCase(
        build=pipe("PRXPipeline", "PRXTransformer2DModel", scheduler=euler),
        call=lambda side: {**pair(kind=torch.bool), **NO_PROMPT, **square(side, 8)}, branches=("cond",),
    ),
    "AmusedPipeline": PipeCase(
        build=pipe("AmusedPipeline", "UVit2DModel", scheduler=lambda: diffusers.AmusedScheduler(mask_token_id=127)),
        call=lambda side: {
            "prompt_embeds": noise(1, 1, 8), "encoder_hidden_states": embeds(2),
            "negative_prompt_embeds": noise(3, 1, 8), "negative_encoder_hidden_states": embeds(4), **square(side, 8),
        },
        branches=("cond",),
    ),
}
