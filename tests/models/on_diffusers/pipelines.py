"""All pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests.models.on_diffusers.image_pipelines import IMAGES
from tests.models.on_diffusers.pipes import WIDTH, PipeCase, pair, vae
from tests.models.on_diffusers.video_pipelines import VIDEOS

PIPELINES: dict[str, PipeCase] = {**IMAGES, **VIDEOS}


def unet_pipeline() -> tuple[Any, dict[str, Any]]:
    """Stable Diffusion, tiny, and what to call it with."""
    torch.manual_seed(4)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4,
    ).eval()
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae(4), text_encoder=None, tokenizer=None, unet=unet, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**pair(""), "height": 8, "width": 8}
