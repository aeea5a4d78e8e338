"""Video and sound pipelines of diffusers around the tiny transformers: prompt embeddings go in, latents come out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import PIL.Image
import torch

from tests.models.on_diffusers.pipes import (
    CASES,
    NO_PROMPT,
    TEXT,
    WIDTH,
    PipeCase,
    euler,
    noise,
    pair,
    picture,
    pipe,
    pooled,
    square,
    two_pairs,
    wan_vae,
)


def _video(side: int) -> dict[str, Any]:
    return {**square(side, 8), "num_frames": 5}


def _unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=6.0)


def _animate(side: int) -> dict[str, Any]:
    colours = ("red", "green", "blue", "white", "black")
    frames = [PIL.Image.new("RGB", (side * 8, side * 8), colour) for colour in colours]
    return {
        **pair(""), **square(side, 8), "image": frames[0], "pose_video": frames, "face_video": frames,
        "segment_frame_length": 5, "guidance_scale": 2.0,
    }


def _seen(made: Any) -> None:
    """In place of its image encoder."""
    made.encode_image = lambda image, device: noise(7, 1, 4, WIDTH)


class _StandIn(SimpleNamespace):
    """For a part that only has to be there."""


def _sizes() -> Any:
    return _StandIn(
        config=_StandIn(latent_channels=4, sampling_rate=8, audio_channels=1), hop_length=1,
        spatial_compression_ratio=16, temporal_compression_ratio=4,
    )


def _autoencoder(name: str) -> Any:
    torch.manual_seed(0)
    return getattr(diffusers, name)(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    ).eval()


def _projection() -> Any:
    torch.manual_seed(0)
    return diffusers.StableAudioProjectionModel(
        text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=32
    )


def _three_image_tokens(made: Any) -> None:
    made.vision_num_semantic_tokens = 3


def _ltx2_rest(made: Any) -> None:
    made.connectors = lambda embeds, mask, **_: (embeds, embeds, mask)
    for name, channels in (("vae", 4), ("audio_vae", 128)):
        config = _StandIn(scaling_factor=1.0, mel_bins=64, latent_channels=8)
        setattr(made, name, _StandIn(
            latents_mean=torch.zeros(channels), latents_std=torch.ones(channels), config=config
        ))


def _no_guard() -> Any:
    return _StandIn(to=lambda device: None)


VIDEOS: dict[str, PipeCase] = {
    "WanPipeline": PipeCase(
        build=pipe(
            "WanPipeline", "WanTransformer3DModel", vae=wan_vae, boundary_ratio=0.875, scheduler=_unipc,
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
    "ChronoEditPipeline": PipeCase(
        build=pipe(
            "ChronoEditPipeline", "ChronoEditTransformer3DModel", vae=wan_vae, scheduler=_unipc,
            config={"in_channels": 12, "image_dim": WIDTH}, after=_seen,
        ),
        call=lambda side: {**pair(""), **square(side, 8), "image": picture(side * 8)},
        branches=("cond", "uncond"),
    ),
    "SkyReelsV2Pipeline": PipeCase(
        build=pipe("SkyReelsV2Pipeline", "SkyReelsV2Transformer3DModel", vae=wan_vae, scheduler=_unipc),
        call=lambda side: {**pair(""), **_video(side)}, branches=("cond", "uncond"),
    ),
    "WanVACEPipeline": PipeCase(
        build=pipe(
            "WanVACEPipeline", "WanVACETransformer3DModel", vae=wan_vae, scheduler=_unipc,
            config={"vace_in_channels": 72},
        ),
        call=lambda side: {**pair(""), **_video(side)}, branches=("cond", "uncond"),
    ),
    "WanAnimatePipeline": PipeCase(
        build=pipe("WanAnimatePipeline", "WanAnimateTransformer3DModel", vae=wan_vae, scheduler=_unipc, after=_seen),
        call=_animate, branches=("cond", "uncond"),
    ),
    "HeliosPipeline": PipeCase(
        build=pipe(
            "HeliosPipeline", "HeliosTransformer3DModel", vae=wan_vae,
            scheduler=lambda: diffusers.HeliosScheduler(stages=1, stage_range=[0, 1]),
        ),
        call=lambda side: {**pair(""), **_video(side), "history_sizes": [4, 2, 1], "num_latent_frames_per_chunk": 2},
        branches=("cond", "uncond"),
    ),
    "HunyuanVideoFramepackPipeline": PipeCase(
        build=pipe(
            "HunyuanVideoFramepackPipeline", "HunyuanVideoFramepackTransformer3DModel", scheduler=euler,
            vae=lambda: _autoencoder("AutoencoderKLHunyuanVideo"), after=_seen,
        ),
        call=lambda side: {
            **pair(), **pooled(8), **_video(side), "true_cfg_scale": 2.0, "image": picture(side * 8),
            "latent_window_size": 2,
        },
        branches=("cond", "uncond"),
    ),
    "HunyuanVideo15Pipeline": PipeCase(
        build=pipe(
            "HunyuanVideo15Pipeline", "HunyuanVideo15Transformer3DModel", scheduler=euler, vae=_sizes,
            guider=lambda: diffusers.ClassifierFreeGuidance(guidance_scale=2.0), config={"in_channels": 9},
            after=_three_image_tokens,
        ),
        call=lambda side: {**two_pairs("prompt_embeds_mask"), **square(side, 16), "num_frames": 5},
        branches=("cond", "uncond"),
    ),
    "LTX2Pipeline": PipeCase(
        build=pipe(
            "LTX2Pipeline", "LTX2VideoTransformer3DModel", scheduler=euler,
            config={"audio_in_channels": 128, "audio_out_channels": 128}, after=_ltx2_rest,
        ),
        call=lambda side: {**pair(), **square(side, 32), "num_frames": 9}, branches=("cond_uncond",),
    ),
    "ConsisIDPipeline": PipeCase(
        build=pipe(
            "ConsisIDPipeline", "ConsisIDTransformer3DModel", scheduler=diffusers.CogVideoXDDIMScheduler,
            vae=lambda: _autoencoder("AutoencoderKLCogVideoX"), config={"in_channels": 8},
        ),
        call=lambda side: {
            **pair(""), **_video(side), "image": picture(side * 8), "id_vit_hidden": [torch.ones(1, 2, 2)],
            "id_cond": torch.ones(1, 2),
        },
        branches=("cond",),
    ),
    "AllegroPipeline": PipeCase(
        build=pipe(
            "AllegroPipeline", "AllegroTransformer3DModel", scheduler=diffusers.DDIMScheduler,
            config={"attention_head_dim": 12, "cross_attention_dim": 24},
        ),
        call=lambda side: {**pair(), **square(side, 8), "num_frames": 8, "negative_prompt": None}, branches=("cond",),
    ),
    "LattePipeline": PipeCase(
        build=pipe("LattePipeline", "LatteTransformer3DModel", scheduler=diffusers.DDIMScheduler),
        call=lambda side: {
            **pair(""), **square(side, 8), "video_length": 2, "negative_prompt": None, "clean_caption": False,
        },
        branches=("cond",),
    ),
    "EasyAnimatePipeline": PipeCase(
        build=pipe("EasyAnimatePipeline", "EasyAnimateTransformer3DModel", scheduler=euler, vae=_sizes),
        call=lambda side: {**pair(), **square(side, 16), "num_frames": 5}, branches=("cond",),
    ),
    "SanaVideoPipeline": PipeCase(
        build=pipe("SanaVideoPipeline", "SanaVideoTransformer3DModel", scheduler=euler, vae=wan_vae),
        call=lambda side: {**pair(), **NO_PROMPT, **square(side, 8), "frames": 5},
        branches=("cond",),
    ),
    "Cosmos2TextToImagePipeline": PipeCase(
        build=pipe(
            "Cosmos2TextToImagePipeline", "CosmosTransformer3DModel", vae=wan_vae, safety_checker=_no_guard,
            scheduler=lambda: euler(use_karras_sigmas=True),
        ),
        call=lambda side: {**pair(""), **square(side, 8)}, branches=("cond", "uncond"),
    ),
    "Kandinsky5T2VPipeline": PipeCase(
        build=pipe("Kandinsky5T2VPipeline", "Kandinsky5Transformer3DModel", scheduler=euler),
        call=lambda side: {
            **{f"{name}_qwen": value for name, value in pair("").items()},
            "prompt_embeds_clip": noise(3, 1, 8), "negative_prompt_embeds_clip": noise(4, 1, 8),
            "prompt_cu_seqlens": torch.tensor([0, TEXT]), "negative_prompt_cu_seqlens": torch.tensor([0, TEXT]),
            **_video(side),
        },
        branches=("cond", "uncond"),
    ),
    "StableAudioPipeline": PipeCase(
        build=pipe(
            "StableAudioPipeline", "StableAudioDiTModel", scheduler=diffusers.EDMDPMSolverMultistepScheduler,
            vae=_sizes, projection_model=_projection, config={"global_states_input_dim": 2 * WIDTH},
        ),
        call=lambda side: {**pair(""), "audio_end_in_s": 1.0, "output_type": "latent"}, branches=("cond",),
    ),
}
