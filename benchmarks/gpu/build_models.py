"""Random-weight models of full size, built where they are used.

    python -m benchmarks.gpu.build_models FOLDER flux:full

Each name is a family (flux, qwen, wan22) and a size (full, mid, tiny). Transformers of ``full`` have the sizes of
FLUX.1-dev (24 GB on disk), Qwen-Image (41 GB) and Wan2.2-T2V-A14B (29 GB: the second expert links to the first one's
weights); ``mid`` is a fifth of it or less, ``tiny`` is for trying the command on a CPU. Text encoders have one layer
and the hidden size that the transformer takes, autoencoders few channels and the right compression: good for the time
of denoising, of nothing else, and never for quality. Weights are bf16 and made on the GPU if there is one.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.tiny.build import clip_tokenizer, qwen_tokenizer, t5_tokenizer

FLUX = {
    "full": dict(num_layers=19, num_single_layers=38, num_attention_heads=24, joint_attention_dim=4096,
                 pooled_projection_dim=768),
    "mid": dict(num_layers=4, num_single_layers=8, num_attention_heads=24, joint_attention_dim=4096,
                pooled_projection_dim=768),
    "tiny": dict(num_layers=1, num_single_layers=2, num_attention_heads=2, joint_attention_dim=128,
                 pooled_projection_dim=64),
}
QWEN = {
    "full": dict(num_layers=60, num_attention_heads=24, joint_attention_dim=3584),
    "mid": dict(num_layers=12, num_attention_heads=24, joint_attention_dim=3584),
    "tiny": dict(num_layers=3, num_attention_heads=2, joint_attention_dim=128),
}
WAN = {
    "full": dict(num_layers=40, num_attention_heads=40, ffn_dim=13824, text_dim=4096, freq_dim=256),
    "mid": dict(num_layers=8, num_attention_heads=40, ffn_dim=13824, text_dim=4096, freq_dim=256),
    "tiny": dict(num_layers=3, num_attention_heads=2, ffn_dim=256, text_dim=128, freq_dim=64),
}
HEAD = 128
"""Width of every attention head, as in the real ones."""


@contextmanager
def made_on(device: str):
    """Modules are created there, in bf16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Matrices ``normal * 0.6 / sqrt(fan_in)``, zero biases: activations stay of order one through all blocks."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim >= 2:
            parameter.normal_(0.0, 0.6 / math.sqrt(parameter[0].numel()))
    return model


def make(device: str, kind: Callable[..., nn.Module], *args: Any, **config: Any) -> nn.Module:
    """One filled network."""
    with made_on(device):
        return fill(kind(*args, **config)).eval()


def t5(device: str, kind: Callable[..., nn.Module], config: Callable[..., Any], vocabulary: int, dim: int) -> nn.Module:
    """One layer of an encoder of the T5 family with hidden size ``dim``."""
    heads = dim // 64
    return make(device, kind, config(
        vocab_size=vocabulary, d_model=dim, d_kv=64, d_ff=min(dim, 1024), num_layers=1, num_heads=heads,
    ))


def flux(folder: Path, size: str, device: str) -> Path:
    """FLUX.1: 16 latent channels packed two by two, 512 text tokens."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    sizes, path = FLUX[size], folder / "FLUX.1-dev"
    tokenizer, vocabulary = clip_tokenizer(folder / "clip-vocabulary")
    tokenizer_2 = t5_tokenizer(512)
    dim = sizes["pooled_projection_dim"]
    clip = make(device, CLIPTextModel, CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=dim, intermediate_size=dim, num_hidden_layers=1,
        num_attention_heads=dim // 64, max_position_embeddings=77, bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
    ))
    transformer = make(
        device, FluxTransformer2DModel, patch_size=1, in_channels=64, attention_head_dim=HEAD, guidance_embeds=True,
        axes_dims_rope=(16, 56, 56), **sizes,
    )
    vae = make(
        device, AutoencoderKL, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64), layers_per_block=1, latent_channels=16, norm_num_groups=16,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611,
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=vae, text_encoder=clip, tokenizer=tokenizer, tokenizer_2=tokenizer_2, transformer=transformer,
        text_encoder_2=t5(device, T5EncoderModel, T5Config, len(tokenizer_2), sizes["joint_attention_dim"]),
    ).save_pretrained(path)
    return path


def qwen(folder: Path, size: str, device: str) -> Path:
    """Qwen-Image: Qwen2.5-VL of one layer, eight-fold compression."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    sizes, path, tokenizer = QWEN[size], folder / "Qwen-Image", qwen_tokenizer()
    dim = sizes["joint_attention_dim"]
    config = Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=dim, intermediate_size=256, num_hidden_layers=1, num_attention_heads=dim // HEAD,
            num_key_value_heads=1, vocab_size=len(tokenizer), max_position_embeddings=4096, rope_theta=1000000.0,
            rope_scaling={"type": "default", "mrope_section": [16, 24, 24], "rope_type": "default"},
        ),
        vision_config=dict(depth=1, hidden_size=64, intermediate_size=64, num_heads=2, out_hidden_size=dim),
        hidden_size=dim, vocab_size=len(tokenizer),
        vision_end_token_id=1, vision_start_token_id=1, vision_token_id=1,
    )
    transformer = make(
        device, QwenImageTransformer2DModel, patch_size=2, in_channels=64, out_channels=16, attention_head_dim=HEAD,
        axes_dims_rope=(16, 56, 56), **sizes,
    )
    vae = make(
        device, AutoencoderKLQwenImage, base_dim=16, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
            max_image_seq_len=8192, shift_terminal=0.02, time_shift_type="exponential",
        ),
        vae=vae, text_encoder=make(device, Qwen2_5_VLForConditionalGeneration, config), tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(path)
    return path


def wan22(folder: Path, size: str, device: str) -> Path:
    """Wan2.2 T2V with two experts, split at 0.875."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    sizes, path, tokenizer = WAN[size], folder / "Wan2.2-T2V-A14B-Diffusers", t5_tokenizer(512)
    transformer = make(
        device, WanTransformer3DModel, patch_size=(1, 2, 2), attention_head_dim=HEAD, in_channels=16, out_channels=16,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=1024, **sizes,
    )
    vae = make(device, AutoencoderKLWan, base_dim=16, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    WanPipeline(
        tokenizer=tokenizer, vae=vae, transformer=transformer, transformer_2=None, boundary_ratio=0.875,
        text_encoder=t5(device, UMT5EncoderModel, UMT5Config, len(tokenizer), sizes["text_dim"]),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    ).save_pretrained(path)
    _second_expert(path)
    return path


def _second_expert(path: Path) -> None:
    """The low-noise expert takes the first one's files; on disk they are there once."""
    first, second = path / "transformer", path / "transformer_2"
    second.mkdir()
    for file in first.iterdir():
        (second / file.name).symlink_to(Path("..") / first.name / file.name)
    index = json.loads((path / "model_index.json").read_text())
    index["transformer_2"] = index["transformer"]
    (path / "model_index.json").write_text(json.dumps(index, indent=2))


BUILDERS: Mapping[str, Callable[[Path, str, str], Path]] = {"flux": flux, "qwen": qwen, "wan22": wan22}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="each model goes into FOLDER/SIZE/, whose name decides the family")
    parser.add_argument("models", nargs="+", metavar="FAMILY:SIZE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for name in args.models:
        family, _, size = name.partition(":")
        started = time.perf_counter()
        folder = args.folder / (size or "full")
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        path = BUILDERS[family](folder, size or "full", args.device)
        shutil.rmtree(folder / "clip-vocabulary", ignore_errors=True)
        if args.device == "cuda":
            torch.cuda.empty_cache()
        gigabytes = sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and not f.is_symlink()) / 1e9
        print(f"{path}: {gigabytes:.1f} GB in {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
