"""Diffusers pipelines with random weights, from tiny to full size, equal on all ranks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.tiny import build

FLUX_SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(num_layers=2, num_single_layers=4, num_attention_heads=8, attention_head_dim=32,
                 joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(8, 12, 12)),
    "mid": dict(num_layers=4, num_single_layers=16, num_attention_heads=16, attention_head_dim=128,
                joint_attention_dim=1024, pooled_projection_dim=768),
    "full": dict(num_layers=19, num_single_layers=38, num_attention_heads=24, attention_head_dim=128,
                 joint_attention_dim=4096, pooled_projection_dim=768),
}
"""Widths of ``FluxTransformer2DModel``: tiny, 1.6 billion parameters, and FLUX.1 (11.9 billion)."""

QWEN_SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(num_layers=4, num_attention_heads=8, attention_head_dim=32, joint_attention_dim=16,
                 axes_dims_rope=(8, 12, 12)),
    "full": dict(num_layers=60, num_attention_heads=24, attention_head_dim=128, joint_attention_dim=3584),
}
"""Widths of ``QwenImageTransformer2DModel``: tiny, and Qwen-Image (20.4 billion parameters)."""

QWEN_TEXT: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=2, mrope=[1, 1, 2]),
    "full": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                 num_key_value_heads=4, mrope=[16, 24, 24]),
}

WAN_SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(num_attention_heads=8, attention_head_dim=24, text_dim=32, freq_dim=32, ffn_dim=128, num_layers=4),
    "full": dict(
        num_attention_heads=40, attention_head_dim=128, text_dim=4096, freq_dim=256, ffn_dim=13824, num_layers=40
    ),
}
"""Widths of each ``WanTransformer3DModel``: tiny, and Wan2.2-A14B (14.3 billion parameters)."""


def fill(module: nn.Module, seed: int, std: float = 0.02) -> nn.Module:
    """Normal weights of one seed, zero biases, ones elsewhere.

    The timestep's embedding is mostly constant, so that residuals change little from step to step, as a trained
    model's do.
    """
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "timestep_embedder" in name or "time_embedder" in name:
            constant = name.endswith("linear_2.bias")
            parameter.data.normal_(0.0, 1.0 if constant else 0.1 * std, generator=generator)
        elif parameter.ndim >= 2:
            parameter.data.normal_(0.0, std, generator=generator)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
    return module.eval().requires_grad_(False)


class On:
    """Modules made inside stand on a device, in a number format."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self._device, self._dtype = device, dtype

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)
        self._device.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._device.__exit__(*error)
        torch.set_default_dtype(self._before)


def flux(size: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A ``FluxPipeline`` with CLIP, T5 and VAE in proportion."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tiny = size == "tiny"
    widths = FLUX_SIZES[size]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, vocabulary = build.clip_tokenizer(Path(folder) / "clip")
    tokenizer_2 = build.t5_tokenizer(512)
    pooled, text = widths["pooled_projection_dim"], widths["joint_attention_dim"]
    with On(device, dtype):
        clip = CLIPTextModel(CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=pooled, intermediate_size=2 * pooled, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=77, bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
        ))
        t5 = T5EncoderModel(T5Config(
            vocab_size=len(tokenizer_2), d_model=text, d_kv=8 if tiny else 64, d_ff=2 * text,
            num_layers=1 if tiny else 12, num_heads=4 if tiny else 16,
        ))
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=16 if tiny else 64, guidance_embeds=True, **widths
        )
        channels = (16, 16) if tiny else (128, 256, 512, 512)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=channels, layers_per_block=1 if tiny else 2, latent_channels=4 if tiny else 16,
            norm_num_groups=4 if tiny else 32, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0,
            scaling_factor=1.0, sample_size=32 if tiny else 1024,
        )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), vae=fill(vae, 5, 0.05),
        text_encoder=fill(clip, 3), tokenizer=tokenizer, text_encoder_2=fill(t5, 4, 0.05), tokenizer_2=tokenizer_2,
        transformer=fill(transformer, 1),
    )


def qwen_image(size: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A ``QwenImagePipeline`` with its text encoder (Qwen2.5-VL) and VAE."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = build.qwen_tokenizer()
    text = dict(QWEN_TEXT[size])
    mrope = text.pop("mrope")
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), max_position_embeddings=4096, rope_theta=1000000.0,
            rope_scaling={"type": "default", "mrope_section": mrope, "rope_type": "default"}, **text,
        ),
        vision_config=dict(
            depth=2, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=text["hidden_size"]
        ),
        hidden_size=text["hidden_size"], vocab_size=len(tokenizer), vision_end_token_id=1, vision_start_token_id=1,
        vision_token_id=1,
    )
    with On(device, dtype):
        text_encoder = Qwen2_5_VLForConditionalGeneration(config)
        transformer = QwenImageTransformer2DModel(patch_size=2, in_channels=64, out_channels=16, **QWEN_SIZES[size])
        vae = AutoencoderKLQwenImage(
            base_dim=8 if size == "tiny" else 96, z_dim=16, dim_mult=[1, 2, 2, 2] if size == "tiny" else [1, 2, 4, 4],
            num_res_blocks=1 if size == "tiny" else 2, temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 16, latents_std=[1.0] * 16,
        )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), vae=fill(vae, 5, 0.05),
        text_encoder=fill(text_encoder, 4), tokenizer=tokenizer, transformer=fill(transformer, 1),
    )


def wan(size: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A ``WanPipeline`` with the two experts of Wan 2.2, and a text encoder of its width but few layers."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tiny = size == "tiny"
    widths = WAN_SIZES[size]
    tokenizer = build.t5_tokenizer(512)
    with On(device, dtype):
        text_encoder = UMT5EncoderModel(UMT5Config(
            vocab_size=len(tokenizer), d_model=widths["text_dim"], d_kv=8 if tiny else 64,
            d_ff=2 * widths["text_dim"], num_layers=1, num_heads=4 if tiny else 64,
        ))
        experts = [WanTransformer3DModel(
            patch_size=(1, 2, 2), in_channels=16, out_channels=16, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=1024, **widths,
        ) for _ in range(2)]
        vae = AutoencoderKLWan(**(dict(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1) if tiny else {}))
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=fill(text_encoder, 4, 0.05), vae=fill(vae, 5, 0.05),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        transformer=fill(experts[0], 1), transformer_2=fill(experts[1], 2), boundary_ratio=0.875,
    )


PIPELINES = {"flux": flux, "qwen": qwen_image, "wan": wan}
