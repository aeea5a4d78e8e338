"""Video and sound pipelines of diffusers around the tiny transformers: prompt embeddings go in, latents come out."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .pipes import CASES, PipeCase, euler, noise, pair, pipe, pooled, square, wan_vae


def _video(side: int) -> dict[str, Any]:
    return {**square(side, 8), "num_frames": 5}


def _unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=6.0)


VIDEOS: dict[str, PipeCase] = {
    "WanPipeline": PipeCase(
        build=pipe(
            "WanPipeline", "WanTransformer3DModel", vae=wan_vae, boundary_ratio=0.875,
            scheduler=_unipc,
            transformer_2=lambda: CASES["WanTransformer3DModel"].build("WanTransformer3DModel"),
        ),
        call=lambda side: {**pair(""), **_video(side)}, branches=("cond", "uncond"), experts=(3, 3),
    ),
    "LTXPipeline": PipeCase(
        build=pipe("LTXPipeline", "LTXVideoTransformer3DModel", scheduler=euler),
        call=lambda side: {**pair(), **square(side, 32), "num_frames": 9}, branches=("cond_uncond",),
    ),
    "CogVideoXPipeline": PipeCase(
        build=pipe("CogVideoXPipeline", "CogVideoXTransformer3DModel", scheduler=diffusers.CogVideoXDDIMScheduler),
        call=lambda side: {**pair(""), **_video(side)}, branches=("cond_uncond",),
    ),
    "HunyuanVideoPipeline": PipeCase(
        build=pipe("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", scheduler=euler),
        call=lambda side: {**pair(), **pooled(8), **_video(side), "true_cfg_scale": 2.0},
        branches=("cond", "uncond"),
    ),
    "MochiPipeline": PipeCase(
        build=pipe("MochiPipeline", "MochiTransformer3DModel", scheduler=euler),
        call=lambda side: {**pair(kind=torch.bool), **square(side, 8), "num_frames": 7}, branches=("cond_uncond",),
    ),
    # Leaves out the beginning without telling the scheduler.
    "WanVideoToVideoPipeline": PipeCase(
        build=pipe("WanVideoToVideoPipeline", "WanTransformer3DModel", vae=wan_vae, scheduler=_unipc),
        call=lambda side: {
            **pair(""), **square(side, 8), "video": noise(6, 1, 5, 3, side * 8, side * 8), "strength": 0.5,
        },
        branches=("cond", "uncond"), first=3,
    ),
}
