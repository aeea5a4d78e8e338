"""The video demo's networks: Wan2.2's architecture with two experts, under 5 M parameters in all.

Shapes below: B videos of 9 frames of 64x64 pixels; latents (B, 16, 3, 8, 8), 48 tokens after 1x2x2 patches.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

FRAMES, SIDE = 9, 64
LATENT_CHANNELS = 16
TEXT_DIM = 64
BOUNDARY = 0.875  # the high-noise expert draws from sigma 1 down to here


@dataclass
class VideoNetworks:
    """Both experts, the VAE, the text encoder and its tokenizer."""

    vae: torch.nn.Module
    high: torch.nn.Module
    low: torch.nn.Module
    encoder: torch.nn.Module
    tokenizer: object

    def conditioned(self) -> list[torch.nn.Module]:
        """What is trained after the VAE, jointly."""
        return [self.high, self.low, self.encoder]


def make_vae():
    """Wan2.1's causal VAE: factor 8 in space, 4 in time."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        # Given explicitly, so that a copied configuration keeps them.
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def decode(vae, latents: torch.Tensor) -> torch.Tensor:
    """(B, 16, F, h, w) -> videos (B, 3, 4 F - 3, 8 h, 8 w) that may leave [-1, 1].

    diffusers' `AutoencoderKLWan.decode` clamps: where a value has left the range no gradient comes back, and on white
    pictures all values soon have.
    """
    vae.clear_cache()
    latents = vae.post_quant_conv(latents)
    frames = []
    for index in range(latents.shape[2]):
        part = latents[:, :, index : index + 1]
        frames.append(vae.decoder(part, feat_cache=vae._feat_map, feat_idx=[0], first_chunk=index == 0))
    vae.clear_cache()
    return torch.cat(frames, dim=2)


def make_expert():
    """6 blocks, 4 heads of 32."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=384,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )


def make_encoder(tokenizer):
    """UMT5 with two layers."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_DIM,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


def encode_text(encoder, ids: torch.Tensor, length: int) -> torch.Tensor:
    """As the hosts do: padding is masked inside the encoder and zero after it. (B, L) -> (B, length, D)."""
    known = ids != 0
    hidden = torch.zeros(ids.shape, device=ids.device).masked_fill(~known, torch.finfo(torch.float32).min)
    states = encoder(input_ids=ids, attention_mask=hidden[:, None, None, :]).last_hidden_state
    states = states * known[:, :, None]
    return torch.nn.functional.pad(states, (0, 0, 0, length - ids.shape[1]))


def normalise(latents: torch.Tensor, config) -> torch.Tensor:
    """VAE means -> what the transformers see."""
    mean = torch.tensor(config.latents_mean, device=latents.device).view(1, -1, 1, 1, 1)
    std = torch.tensor(config.latents_std, device=latents.device).view(1, -1, 1, 1, 1)
    return (latents - mean) / std


def save(nets: VideoNetworks, folder: Path) -> None:
    """Write a diffusers folder in bf16 safetensors."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    from tools.demo_models.model import bf16_copy

    WanPipeline(
        tokenizer=nets.tokenizer,
        text_encoder=bf16_copy(nets.encoder),
        vae=bf16_copy(nets.vae),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
        transformer=bf16_copy(nets.high),
        transformer_2=bf16_copy(nets.low),
        boundary_ratio=BOUNDARY,
    ).save_pretrained(folder, safe_serialization=True)
