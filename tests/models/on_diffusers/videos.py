"""Video and sound models of diffusers."""

from __future__ import annotations

from typing import Any

import torch

from tests.models.on_diffusers.zoo import Case, Noise

TEXT, WIDTH, FRAMES = 3, 16, 2
_HEADS = {"attention_head_dim": 12, "num_attention_heads": 2}
_EIGHT = {"attention_head_dim": 8, "num_attention_heads": 2}
_DOUBLE_SINGLE = ("transformer_blocks", "single_transformer_blocks")


def _clip(n: Noise, side: int, channels: int = 4, frames: int = FRAMES) -> dict[str, Any]:
    return {
        "hidden_states": n(1, channels, frames, side, side), "timestep": n.time,
        "encoder_hidden_states": n.fixed(1, TEXT, WIDTH),
    }


def _frames_first(n: Noise, side: int) -> dict[str, Any]:
    return {**_clip(n, side), "hidden_states": n(1, FRAMES, 4, side, side)}


def _hunyuan(n: Noise, side: int) -> dict[str, Any]:
    return {
        **_clip(n, side), "pooled_projections": n.fixed(1, 8), "encoder_attention_mask": torch.ones(1, TEXT),
        "guidance": torch.tensor([1000.0]),
    }


def _framepack(n: Noise, side: int) -> dict[str, Any]:
    past = {"latents_clean": 2, "latents_history_2x": 2, "latents_history_4x": 4}
    indices = {f"indices_{name}": torch.arange(count) for name, count in past.items()}
    return {
        **_hunyuan(n, side), "image_embeds": n.fixed(1, 3, WIDTH), "indices_latents": torch.arange(FRAMES),
        **{name: n.fixed(1, 4, count, side, side) for name, count in past.items()}, **indices,
    }


def _hunyuan15(n: Noise, side: int) -> dict[str, Any]:
    return {
        **_clip(n, side), "encoder_hidden_states_2": n.fixed(1, 2, WIDTH), "image_embeds": torch.zeros(1, 3, 12),
        "encoder_attention_mask": torch.ones(1, TEXT), "encoder_attention_mask_2": torch.ones(1, 2),
    }


def _ltx(n: Noise, side: int) -> dict[str, Any]:
    return {
        "hidden_states": n(1, FRAMES * side * side, 4), "timestep": n.time, "num_frames": FRAMES, "height": side,
        "width": side, "encoder_hidden_states": n.fixed(1, TEXT, WIDTH),
        "encoder_attention_mask": torch.ones(1, TEXT).bool(),
    }


def _ltx2(n: Noise, side: int) -> dict[str, Any]:
    return {
        **_ltx(n, side), "audio_hidden_states": n(1, 5, 4), "audio_num_frames": 5, "fps": 25.0,
        "audio_encoder_hidden_states": n.fixed(1, TEXT, WIDTH),
    }


def _cosmos(n: Noise, side: int) -> dict[str, Any]:
    return {
        **_clip(n, side), "attention_mask": torch.ones(1, TEXT), "fps": 24,
        "padding_mask": torch.zeros(1, 1, side, side),
    }


def _kandinsky(n: Noise, side: int) -> dict[str, Any]:
    return {
        "hidden_states": n(1, FRAMES, side, side, 4), "timestep": n.time, "pooled_projections": n.fixed(1, 8),
        "encoder_hidden_states": n.fixed(1, TEXT, WIDTH), "text_rope_pos": torch.arange(TEXT),
        "visual_rope_pos": [torch.arange(FRAMES), torch.arange(side // 2), torch.arange(side // 2)],
    }


def _helios(n: Noise, side: int) -> dict[str, Any]:
    past = {"short": 1, "mid": 2, "long": 4}
    return {
        **_clip(n, side), "indices_hidden_states": torch.arange(FRAMES)[None],
        **{f"indices_latents_history_{name}": torch.arange(count)[None] for name, count in past.items()},
        **{f"latents_history_{name}": n.fixed(1, 4, count, side, side) for name, count in past.items()},
    }


def _vace(n: Noise, side: int) -> dict[str, Any]:
    return {**_clip(n, side), "control_hidden_states": n.fixed(1, 8, FRAMES, side, side)}


def _animate(n: Noise, side: int) -> dict[str, Any]:
    return {
        **_clip(n, side, channels=12, frames=3), "encoder_hidden_states_image": n.fixed(1, 4, WIDTH),
        "pose_hidden_states": n.fixed(1, 4, 2, side, side), "face_pixel_values": n.fixed(1, 3, 5, 16, 16),
    }


def _consisid(n: Noise, side: int) -> dict[str, Any]:
    return {**_frames_first(n, side), "id_vit_hidden": [torch.ones(1, 2, 2)], "id_cond": torch.ones(1, 2)}


def _sound(n: Noise, side: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    rope = get_1d_rotary_pos_embed(4, side * 2 + 1, use_real=True, repeat_interleave_real=False)
    return {
        "hidden_states": n(1, 3, side * 2), "timestep": n.time / 1000, "encoder_hidden_states": n.fixed(1, TEXT, 16),
        "global_hidden_states": n.fixed(1, 1, 8), "rotary_embedding": rope,
    }


_WAN = {
    **_HEADS, "patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "text_dim": WIDTH, "freq_dim": 16,
    "ffn_dim": 32, "num_layers": 4, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
}
_HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 3,
    "num_single_layers": 3, "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True,
    "text_embed_dim": WIDTH, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
}
_COG = {
    **_EIGHT, "in_channels": 4, "out_channels": 4, "time_embed_dim": 2, "text_embed_dim": WIDTH, "num_layers": 4,
    "sample_width": 8, "sample_height": 8, "sample_frames": 5, "patch_size": 2, "temporal_compression_ratio": 4,
    "max_text_seq_length": TEXT, "use_rotary_positional_embeddings": False,
}
_LTX = {
    **_EIGHT, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "num_layers": 4,
    "qk_norm": "rms_norm_across_heads", "caption_channels": WIDTH,
}

CASES: dict[str, Case] = {
    "WanTransformer3DModel": Case(config=_WAN, inputs=_clip, lists=("blocks",)),
    "ChronoEditTransformer3DModel": Case(
        config={**_WAN, "rope_temporal_skip_len": 8}, inputs=_clip, lists=("blocks",)
    ),
    "SkyReelsV2Transformer3DModel": Case(
        config=_WAN, inputs=lambda n, side: {**_clip(n, side), "timestep": n.time.long()}, lists=("blocks",)
    ),
    "WanVACETransformer3DModel": Case(
        config={**_WAN, "vace_layers": [0, 2], "vace_in_channels": 8}, inputs=_vace, lists=("blocks",)
    ),
    "WanAnimateTransformer3DModel": Case(
        config={
            **_WAN, "in_channels": 12, "latent_channels": 4, "image_dim": WIDTH, "motion_encoder_size": 16,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_style_dim": 8, "motion_dim": 4,
            "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        inputs=_animate, lists=("blocks",),
    ),
    "HeliosTransformer3DModel": Case(
        config={
            **{name: value for name, value in _WAN.items() if name != "rope_max_seq_len"}, "rope_dim": (4, 4, 4),
            "has_multi_term_memory_patch": True, "guidance_cross_attn": True, "zero_history_timestep": True,
            "is_amplify_history": False,
        },
        inputs=_helios, lists=("blocks",),
    ),
    "HunyuanVideoTransformer3DModel": Case(
        config={**_HUNYUAN, "image_condition_type": None}, inputs=_hunyuan, lists=_DOUBLE_SINGLE
    ),
    "HunyuanVideoFramepackTransformer3DModel": Case(
        config={**_HUNYUAN, "has_image_proj": True, "image_proj_dim": WIDTH, "has_clean_x_embedder": True},
        inputs=_framepack, lists=_DOUBLE_SINGLE,
    ),
    "HunyuanVideo15Transformer3DModel": Case(
        config={
            **_EIGHT, "in_channels": 4, "out_channels": 4, "num_layers": 4, "num_refiner_layers": 1,
            "mlp_ratio": 2.0, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": WIDTH, "text_embed_2_dim": WIDTH,
            "image_embed_dim": 12, "rope_axes_dim": (2, 2, 4), "target_size": 16, "task_type": "t2v",
        },
        inputs=_hunyuan15,
    ),
    "LTXVideoTransformer3DModel": Case(config=_LTX, inputs=_ltx),
    "LTX2VideoTransformer3DModel": Case(
        config={
            **_LTX, "patch_size": 1, "patch_size_t": 1, "audio_in_channels": 4, "audio_out_channels": 4,
            "audio_num_attention_heads": 2, "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8,
            "rope_double_precision": False,
        },
        inputs=_ltx2,
    ),
    "CogVideoXTransformer3DModel": Case(config=_COG, inputs=_frames_first),
    "ConsisIDTransformer3DModel": Case(
        config={
            **_COG, "is_train_face": True, "is_kps": False, "cross_attn_interval": 2, "cross_attn_dim_head": 1,
            "cross_attn_num_heads": 1, "LFE_id_dim": 2, "LFE_vit_dim": 2, "LFE_depth": 5, "LFE_dim_head": 8,
            "LFE_num_heads": 2, "LFE_num_id_token": 1, "LFE_num_querie": 1, "LFE_output_dim": 10, "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        inputs=_consisid,
    ),
    "MochiTransformer3DModel": Case(
        config={
            **_EIGHT, "patch_size": 2, "num_layers": 4, "pooled_projection_dim": 16, "in_channels": 4,
            "qk_norm": "rms_norm", "text_embed_dim": WIDTH, "time_embed_dim": 4, "activation_fn": "swiglu",
            "max_sequence_length": TEXT,
        },
        inputs=lambda n, side: {**_clip(n, side), "encoder_attention_mask": torch.ones(1, TEXT).bool()},
    ),
    "AllegroTransformer3DModel": Case(
        config={
            **_EIGHT, "in_channels": 4, "out_channels": 4, "num_layers": 4, "cross_attention_dim": 16,
            "sample_width": 8, "sample_height": 8, "sample_frames": 8, "caption_channels": WIDTH,
        },
        inputs=lambda n, side: {
            **_clip(n, side), "attention_mask": torch.ones(1, FRAMES, side, side),
            "encoder_attention_mask": torch.ones(1, TEXT),
        },
    ),
    "LatteTransformer3DModel": Case(
        config={
            **_EIGHT, "sample_size": 8, "num_layers": 4, "patch_size": 2, "caption_channels": WIDTH,
            "in_channels": 4, "cross_attention_dim": 16, "out_channels": 8, "attention_bias": True,
            "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "video_length": FRAMES,
        },
        inputs=lambda n, side: {**_clip(n, side), "enable_temporal_attentions": True},
    ),
    "EasyAnimateTransformer3DModel": Case(
        config={
            "attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 4, "mmdit_layers": 2,
            "num_layers": 4, "out_channels": 4, "patch_size": 2, "sample_height": 60, "sample_width": 90,
            "text_embed_dim": WIDTH, "time_embed_dim": 8, "time_position_encoding_type": "3d_rope",
        },
        inputs=_clip,
    ),
    "SanaVideoTransformer3DModel": Case(
        config={
            **_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 4, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": WIDTH, "sample_size": 8,
            "patch_size": (1, 2, 2), "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
        },
        inputs=_clip,
    ),
    "CosmosTransformer3DModel": Case(
        config={
            **_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 4, "mlp_ratio": 2, "text_embed_dim": WIDTH,
            "adaln_lora_dim": 4, "max_size": (4, 32, 32), "patch_size": (1, 2, 2), "rope_scale": (2.0, 1.0, 1.0),
            "controlnet_block_every_n": 2,
        },
        inputs=_cosmos,
        extra={
            "controlnet": lambda n, side: {
                **_cosmos(n, side), "block_controlnet_hidden_states": [n(1, side * side // 2, 24) for _ in range(2)],
            },
        },
    ),
    "Kandinsky5Transformer3DModel": Case(
        config={
            "in_visual_dim": 4, "in_text_dim": WIDTH, "in_text_dim2": 8, "time_dim": 16, "out_visual_dim": 4,
            "model_dim": 16, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 4, "axes_dims": (2, 2, 4),
        },
        inputs=_kandinsky, lists=("visual_transformer_blocks",),
    ),
    "StableAudioDiTModel": Case(
        config={
            "sample_size": 8, "in_channels": 3, "num_layers": 4, "attention_head_dim": 8, "num_attention_heads": 2,
            "num_key_value_attention_heads": 2, "out_channels": 3, "cross_attention_dim": 16, "time_proj_dim": 8,
            "global_states_input_dim": 8, "cross_attention_input_dim": 16,
        },
        inputs=_sound,
    ),
}
