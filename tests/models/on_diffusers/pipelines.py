"""Real pipelines of diffusers around the tiny transformers: prompt embeddings go in, latents come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from . import images, videos
from .zoo import widen

TEXT, WIDTH = 3, 16
CASES = {**images.CASES, **videos.CASES}


@dataclass(frozen=True, kw_only=True)
class PipeCase:
    """One pipeline.

    Args:
        build: makes it, untouched by the plugin.
        call: (side of the picture, 4 or 8 latent pixels) -> arguments.
        branches: what the report must call its branches.
        experts: steps that each of two transformers takes, by their boundary.
    """

    build: Callable[[], Any]
    call: Callable[[int], dict[str, Any]]
    branches: tuple[str, ...]
    experts: tuple[int, ...] = ()

    def schedule(self, computed: list[int], cached: list[int]) -> dict[str, dict[str, tuple[list[int], list[int]]]]:
        """What the report must say: (computed, cached) by transformer and branch."""
        bounds, names = [0, *self.experts], ("transformer", "transformer_2")
        if not self.experts:
            return {"transformer": {branch: (computed, cached) for branch in self.branches}}
        spans = [range(start, start + count) for start, count in zip(bounds, self.experts, strict=False)]
        return {
            name: {
                branch: ([s for s in computed if s in span], [s for s in cached if s in span])
                for branch in self.branches
            }
            for name, span in zip(names, spans, strict=True)
        }


def _noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _embeds(seed: int = 0) -> torch.Tensor:
    return _noise(seed, 1, TEXT, WIDTH)


def _pair(mask: str = "prompt_attention_mask", kind: Any = torch.long) -> dict[str, Any]:
    both = {"prompt_embeds": _embeds(1), "negative_prompt_embeds": _embeds(2)}
    if mask:
        both |= {name: torch.ones(1, TEXT, dtype=kind) for name in (mask, f"negative_{mask}")}
    return both


def _pooled(width: int = WIDTH) -> dict[str, Any]:
    return {"pooled_prompt_embeds": _noise(3, 1, width), "negative_pooled_prompt_embeds": _noise(4, 1, width)}


def _vae(channels: int) -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=channels, norm_num_groups=1,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0,
    ).eval()


def _wan_vae() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()


def _euler(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def _pipe(name: str, transformer: str, **components: Any) -> Callable[[], Any]:
    """A pipeline with a tiny transformer; what ``__init__`` wants beyond ``components`` is None."""

    def build() -> Any:
        import inspect

        cls = getattr(diffusers, name)
        given = {key: value() if callable(value) else value for key, value in components.items()}
        given["transformer"] = CASES[transformer].build(transformer)
        for key, parameter in inspect.signature(cls.__init__).parameters.items():
            if key != "self" and parameter.default is parameter.empty:
                given.setdefault(key, None)
        if "controlnet" in given:
            given["controlnet"] = given["controlnet"](given["transformer"])
        pipe = cls(**given)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


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


_NO_PROMPT = {"negative_prompt": None, "use_resolution_binning": False}


def _square(side: int, scale: int) -> dict[str, int]:
    return {"height": side * scale, "width": side * scale}


def _flux(side: int) -> dict[str, Any]:
    # Latents are packed two by two: 8 pixels are 4 tokens a side.
    return {**_pair(""), **_pooled(), **_square(side, 2), "true_cfg_scale": 2.0}


def _picture(side: int) -> torch.Tensor:
    return _noise(6, 1, 3, side, side).clamp(-1, 1)


def _video(side: int) -> dict[str, Any]:
    return {**_square(side, 8), "num_frames": 5}


PIPELINES: dict[str, PipeCase] = {
    "FluxPipeline": PipeCase(
        build=_pipe("FluxPipeline", "FluxTransformer2DModel", scheduler=_euler, vae=lambda: _vae(1)),
        call=_flux, branches=("cond", "uncond"),
    ),
    "FluxKontextPipeline": PipeCase(
        build=_pipe("FluxKontextPipeline", "FluxTransformer2DModel", scheduler=_euler, vae=lambda: _vae(1)),
        call=lambda side: {
            **_pair(""), **_pooled(), **_square(side, 2), "image": _picture(side * 2), "_auto_resize": False,
            "max_area": (side * 2) ** 2,
        },
        branches=("cond",),
    ),
    "FluxControlNetPipeline": PipeCase(
        build=_pipe(
            "FluxControlNetPipeline", "FluxTransformer2DModel", scheduler=_euler, vae=lambda: _vae(1),
            controlnet=lambda: _flux_control,
        ),
        call=lambda side: {**_flux(side), "true_cfg_scale": 1.0, "control_image": _picture(side * 2)},
        branches=("cond",),
    ),
    "StableDiffusion3Pipeline": PipeCase(
        build=_pipe("StableDiffusion3Pipeline", "SD3Transformer2DModel", scheduler=_euler, vae=lambda: _vae(4)),
        call=lambda side: {**_pair(""), **_pooled(), **_square(side, 1)}, branches=("cond",),
    ),
    "StableDiffusion3ControlNetPipeline": PipeCase(
        build=_pipe(
            "StableDiffusion3ControlNetPipeline", "SD3Transformer2DModel", scheduler=_euler, vae=lambda: _vae(4),
            controlnet=lambda: _sd3_control,
        ),
        call=lambda side: {**_pair(""), **_pooled(), **_square(side, 2), "control_image": _picture(side * 2)},
        branches=("cond",),
    ),
    "QwenImagePipeline": PipeCase(
        build=_pipe("QwenImagePipeline", "QwenImageTransformer2DModel", scheduler=_euler),
        call=lambda side: {
            **_pair("prompt_embeds_mask"), **_square(side, 16), "true_cfg_scale": 2.0,
        },
        branches=("cond", "uncond"),
    ),
    "WanPipeline": PipeCase(
        build=_pipe(
            "WanPipeline", "WanTransformer3DModel", vae=_wan_vae, boundary_ratio=0.875,
            scheduler=lambda: diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=6.0
            ),
            transformer_2=lambda: CASES["WanTransformer3DModel"].build("WanTransformer3DModel"),
        ),
        call=lambda side: {**_pair(""), **_video(side)}, branches=("cond", "uncond"), experts=(3, 3),
    ),
    "LTXPipeline": PipeCase(
        build=_pipe("LTXPipeline", "LTXVideoTransformer3DModel", scheduler=_euler),
        call=lambda side: {**_pair(), **_square(side, 32), "num_frames": 9}, branches=("cond_uncond",),
    ),
    "CogVideoXPipeline": PipeCase(
        build=_pipe("CogVideoXPipeline", "CogVideoXTransformer3DModel", scheduler=diffusers.CogVideoXDDIMScheduler),
        call=lambda side: {**_pair(""), **_video(side)}, branches=("cond_uncond",),
    ),
    "SanaPipeline": PipeCase(
        build=_pipe("SanaPipeline", "SanaTransformer2DModel", scheduler=_euler),
        call=lambda side: {**_pair(), **_NO_PROMPT, **_square(side, 32)}, branches=("cond",),
    ),
    "PixArtSigmaPipeline": PipeCase(
        build=_pipe("PixArtSigmaPipeline", "PixArtTransformer2DModel", scheduler=diffusers.DDIMScheduler),
        call=lambda side: {**_pair(), **_NO_PROMPT, **_square(side, 8)}, branches=("cond",),
    ),
    "AuraFlowPipeline": PipeCase(
        build=_pipe("AuraFlowPipeline", "AuraFlowTransformer2DModel", scheduler=_euler),
        call=lambda side: {**_pair(), **_square(side, 8)}, branches=("cond",),
    ),
    "ChromaPipeline": PipeCase(
        build=_pipe("ChromaPipeline", "ChromaTransformer2DModel", scheduler=_euler, vae=lambda: _vae(1)),
        call=lambda side: {**_pair(kind=torch.bool), **_square(side, 2)}, branches=("cond", "uncond"),
    ),
    "ZImagePipeline": PipeCase(
        build=_pipe("ZImagePipeline", "ZImageTransformer2DModel", scheduler=_euler, vae=lambda: _vae(4)),
        call=lambda side: {
            "prompt_embeds": [_embeds(1)[0]], "negative_prompt_embeds": [_embeds(2)[0]], **_square(side, 2),
        },
        branches=("cond",),
    ),
    "Lumina2Pipeline": PipeCase(
        build=_pipe("Lumina2Pipeline", "Lumina2Transformer2DModel", scheduler=_euler),
        call=lambda side: {**_pair(), **_square(side, 8)}, branches=("cond", "uncond"),
    ),
    "HunyuanVideoPipeline": PipeCase(
        build=_pipe("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", scheduler=_euler),
        call=lambda side: {**_pair(), **_pooled(8), **_video(side), "true_cfg_scale": 2.0},
        branches=("cond", "uncond"),
    ),
    "CogView4Pipeline": PipeCase(
        build=_pipe("CogView4Pipeline", "CogView4Transformer2DModel", scheduler=_euler),
        call=lambda side: {**_pair(""), **_square(side, 8)}, branches=("cond", "uncond"),
    ),
    "HunyuanDiTPipeline": PipeCase(
        build=_pipe("HunyuanDiTPipeline", "HunyuanDiT2DModel", scheduler=diffusers.DDPMScheduler),
        call=lambda side: {
            **_pair(), **{f"{name}_2": value for name, value in _pair().items()}, **_square(side, 8),
            "use_resolution_binning": False,
        },
        branches=("cond",),
    ),
    "DiTPipeline": PipeCase(
        build=_pipe("DiTPipeline", "DiTTransformer2DModel", scheduler=diffusers.DDIMScheduler, vae=lambda: _vae(4)),
        call=lambda side: {"class_labels": [1] * (side // 4)}, branches=("cond",),
    ),
    "MochiPipeline": PipeCase(
        build=_pipe("MochiPipeline", "MochiTransformer3DModel", scheduler=_euler),
        call=lambda side: {**_pair(kind=torch.bool), **_square(side, 8), "num_frames": 7}, branches=("cond_uncond",),
    ),
}


def unet_pipeline() -> tuple[Any, dict[str, Any]]:
    """Stable Diffusion, tiny, and what to call it with."""
    torch.manual_seed(4)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4,
    ).eval()
    pipe = diffusers.StableDiffusionPipeline(
        vae=_vae(4), text_encoder=None, tokenizer=None, unet=unet, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**_pair(""), "height": 8, "width": 8}
