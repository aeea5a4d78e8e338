"""The demo's networks: FLUX.1's architecture, about 8 M parameters in all.

Shapes below: B pictures, T = 64 image tokens (a 16x16 latent in 2x2 patches), L text tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

LATENT_CHANNELS = 16
JOINT_DIM = 96  # width of T5's output
POOLED_DIM = 64  # width of CLIP's pooled output
GRID = 8  # image tokens a side: 128 pixels / VAE factor 8 / patch 2


@dataclass
class Networks:
    """Everything that is trained, and the two tokenizers."""

    vae: torch.nn.Module
    transformer: torch.nn.Module
    clip: torch.nn.Module
    t5: torch.nn.Module
    clip_tokenizer: object
    t5_tokenizer: object

    def conditioned(self) -> list[torch.nn.Module]:
        """What is trained after the VAE, jointly."""
        return [self.transformer, self.clip, self.t5]


def make_vae(deepest: int = 96):
    """1.9 M parameters, factor 8, 16 channels, no quant convolutions, as FLUX.1's."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 48, 64, deepest),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
        # Given explicitly, because diffusers drops from a copied configuration what was left at its default.
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def make_transformer():
    """4 double and 8 single blocks, 4 heads of 40, guidance embedding; 7.05 M parameters."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=40,
        num_attention_heads=4,
        joint_attention_dim=JOINT_DIM,
        pooled_projection_dim=POOLED_DIM,
        guidance_embeds=True,
        axes_dims_rope=(8, 16, 16),
    )


def make_clip(tokenizer):
    """Two layers; its state at the end marker is the pooled vector that steers every AdaLN."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=POOLED_DIM,
            intermediate_size=4 * POOLED_DIM,
            projection_dim=POOLED_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_t5(tokenizer, d_model=JOINT_DIM, d_kv=24, d_ff=192, num_layers=2):
    """A few layers, gated GELU. The host gives it no mask, so the padding takes part, here as there."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=d_model,
            d_kv=d_kv,
            d_ff=d_ff,
            num_layers=num_layers,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def make_scheduler():
    """FLUX.1-dev's: the host computes the shift from the number of image tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, H/2 * W/2, 4C), FLUX's 2x2 patches."""
    b, c, h, w = latents.shape
    patches = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(tokens: torch.Tensor, side: int = GRID) -> torch.Tensor:
    """The inverse of pack for a square picture of `side` tokens a side."""
    b, _, c = tokens.shape
    patches = tokens.view(b, side, side, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(b, c // 4, 2 * side, 2 * side)


def image_ids(device) -> torch.Tensor:
    """Rotary positions of the image tokens, (T, 3); those of the text are all zero."""
    side = torch.arange(GRID, device=device, dtype=torch.float32)
    rows, columns = torch.meshgrid(side, side, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)


def velocity(nets: Networks, noisy, sigma, clip_ids, t5_ids, guidance) -> torch.Tensor:
    """What the host's pipelines compute in one step, text encoders included. (B, T, 64) -> (B, T, 64)."""
    pooled = nets.clip(input_ids=clip_ids).pooler_output
    context = nets.t5(input_ids=t5_ids).last_hidden_state
    return nets.transformer(
        hidden_states=noisy,
        timestep=sigma,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=context,
        txt_ids=torch.zeros(t5_ids.shape[1], 3, device=noisy.device),
        img_ids=image_ids(noisy.device),
        return_dict=False,
    )[0]


def bf16_copy(net: torch.nn.Module) -> torch.nn.Module:
    """A fresh, uncompiled network with the same weights, so that training can go on in float32."""
    if hasattr(net, "from_config"):
        # Of a resumed training it holds the path of the folder.
        copy = type(net).from_config({name: value for name, value in net.config.items() if name != "_name_or_path"})
    else:
        copy = type(net)(net.config)
    copy.load_state_dict(net.state_dict())
    return copy.to(torch.bfloat16)


def save(nets: Networks, folder: Path) -> None:
    """Write a diffusers folder in bf16 safetensors."""
    from diffusers import FluxPipeline

    pipeline = FluxPipeline(
        scheduler=make_scheduler(),
        vae=bf16_copy(nets.vae),
        text_encoder=bf16_copy(nets.clip),
        tokenizer=nets.clip_tokenizer,
        text_encoder_2=bf16_copy(nets.t5),
        tokenizer_2=nets.t5_tokenizer,
        transformer=bf16_copy(nets.transformer),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
