"""Picture models of diffusers."""

from __future__ import annotations

from typing import Any

import torch

from tests.models.on_diffusers.zoo import Case, Noise, grid_ids

TEXT, WIDTH = 3, 16
_HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}
_JOINT = {**_HEADS, "patch_size": 1, "in_channels": 4, "num_layers": 4, "joint_attention_dim": WIDTH}
_DOUBLE_SINGLE = ("transformer_blocks", "single_transformer_blocks")


def _packed(n: Noise, side: int, axes: int = 3) -> dict[str, Any]:
    return {
        "hidden_states": n(1, side * side, 4), "encoder_hidden_states": n.fixed(1, TEXT, WIDTH),
        "img_ids": grid_ids(side, axes), "txt_ids": torch.zeros(TEXT, axes), "timestep": n.time / 1000,
    }


def _picture(n: Noise, side: int, channels: int = 4) -> dict[str, Any]:
    return {
        "hidden_states": n(1, channels, side, side), "timestep": n.time,
        "encoder_hidden_states": n.fixed(1, TEXT, WIDTH),
    }


def _sizes(side: int) -> dict[str, Any]:
    size = torch.tensor([[8.0 * side, 8.0 * side]])
    return {"original_size": size, "target_size": size, "crop_coords": torch.zeros(1, 2)}


def _control(n: Noise, side: int, count: int = 2) -> list[torch.Tensor]:
    return [n(1, side * side, 16) for _ in range(count)]


def _flux(n: Noise, side: int) -> dict[str, Any]:
    return {**_packed(n, side), "pooled_projections": n.fixed(1, WIDTH), "guidance": torch.ones(1)}


def _qwen(n: Noise, side: int) -> dict[str, Any]:
    return {
        "hidden_states": n(1, side * side, 4), "encoder_hidden_states": n.fixed(1, TEXT, WIDTH),
        "encoder_hidden_states_mask": torch.ones(1, TEXT).bool(), "timestep": n.time / 1000,
        "img_shapes": [[(1, side, side)]], "txt_seq_lens": [TEXT],
    }


def _sd3(n: Noise, side: int) -> dict[str, Any]:
    return {**_picture(n, side), "pooled_projections": n.fixed(1, WIDTH)}


def _glm(n: Noise, side: int) -> dict[str, Any]:
    sizes = _sizes(side)
    return {
        **_picture(n, side), "prior_token_id": torch.arange(side * side // 4)[None],
        "prior_token_drop": torch.zeros(1, side * side // 4).bool(),
        "target_size": sizes["target_size"], "crop_coords": sizes["crop_coords"],
    }


def _hidream(n: Noise, side: int) -> dict[str, Any]:
    return {
        "hidden_states": n(1, 4, side, side), "encoder_hidden_states_t5": n.fixed(1, TEXT, 8),
        "encoder_hidden_states_llama3": n.fixed(2, 1, TEXT, 4), "pooled_embeds": n.fixed(1, 8), "timesteps": n.time,
    }


def _hunyuan_dit(n: Noise, side: int) -> dict[str, Any]:
    return {
        **_picture(n, side), "text_embedding_mask": torch.ones(1, TEXT), "style": torch.zeros(1, dtype=torch.long),
        "encoder_hidden_states_t5": n.fixed(1, TEXT, WIDTH), "text_embedding_mask_t5": torch.ones(1, TEXT),
        "image_meta_size": torch.tensor([[1024.0, 1024, 16, 16, 0, 0]]),
        "image_rotary_emb": [torch.ones(side * side // 4, 8), torch.zeros(side * side // 4, 8)],
    }


def _hunyuan_image(n: Noise, side: int) -> dict[str, Any]:
    return {
        **_picture(n, side), "encoder_attention_mask": torch.ones(1, TEXT),
        "encoder_hidden_states_2": n.fixed(1, 2, WIDTH), "encoder_attention_mask_2": torch.ones(1, 2),
    }


def _lumina_next(n: Noise, side: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    rope = get_2d_rotary_pos_embed_lumina(8, 64, 64)
    return {
        **_picture(n, side), "encoder_mask": torch.ones(1, TEXT).bool(), "image_rotary_emb": rope,
        "cross_attention_kwargs": {},
    }


def _omnigen(n: Noise, side: int) -> dict[str, Any]:
    length = TEXT + 1 + (side // 2) ** 2
    return {
        "hidden_states": n(1, 4, side, side), "timestep": n.time / 1000, "input_ids": torch.ones(1, TEXT).long(),
        "input_img_latents": [], "input_image_sizes": {}, "attention_mask": torch.ones(1, length, length),
        "position_ids": torch.arange(length)[None],
    }


def _z_image(n: Noise, side: int) -> dict[str, Any]:
    return {"x": [n(4, 1, side, side)], "cap_feats": [n.fixed(TEXT, WIDTH)], "t": 1 - n.time / 1000}


def _bria_fibo(n: Noise, side: int) -> dict[str, Any]:
    return {**_packed(n, side), "text_encoder_layers": [n.fixed(1, TEXT, 8) for _ in range(7)]}


def _amused(n: Noise, side: int) -> dict[str, Any]:
    ids = (n.fixed(1, side, side).abs() * 20).long() + n.step
    return {
        "input_ids": ids, "encoder_hidden_states": n.fixed(1, TEXT, WIDTH),
        "pooled_text_emb": n.fixed(1, 8), "micro_conds": torch.ones(1, 5),
    }


_PIXART = {
    **_HEADS, "sample_size": 8, "num_layers": 4, "patch_size": 2, "in_channels": 4, "cross_attention_dim": 16,
    "out_channels": 8, "attention_bias": True, "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
    "use_additional_conditions": False, "caption_channels": WIDTH,
}
_SANA = {
    "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 4, "attention_head_dim": 8,
    "num_attention_heads": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8,
    "cross_attention_dim": 16, "caption_channels": WIDTH, "sample_size": 8,
}
_FLUX = {**_JOINT, "num_single_layers": 3, "pooled_projection_dim": WIDTH, "axes_dims_rope": (2, 2, 4)}

CASES: dict[str, Case] = {
    "FluxTransformer2DModel": Case(
        config={**_FLUX, "guidance_embeds": True}, inputs=_flux, lists=_DOUBLE_SINGLE,
        extra={
            "controlnet": lambda n, side: {
                **_flux(n, side), "controlnet_block_samples": _control(n, side),
                "controlnet_single_block_samples": _control(n, side, 3),
            },
        },
    ),
    "Flux2Transformer2DModel": Case(
        config={**_JOINT, "num_single_layers": 3, "axes_dims_rope": (2, 2, 2, 2)}, lists=_DOUBLE_SINGLE,
        inputs=lambda n, side: {**_packed(n, side, 4), "guidance": torch.ones(1)},
    ),
    "ChromaTransformer2DModel": Case(
        config={
            **_JOINT, "num_single_layers": 3, "axes_dims_rope": (2, 2, 4), "approximator_num_channels": 8,
            "approximator_hidden_dim": 16, "approximator_layers": 1,
        },
        inputs=_packed, lists=_DOUBLE_SINGLE,
        extra={"controlnet": lambda n, side: {**_packed(n, side), "controlnet_block_samples": _control(n, side)}},
    ),
    "BriaTransformer2DModel": Case(
        config={**_FLUX, "pooled_projection_dim": None}, inputs=_packed, lists=_DOUBLE_SINGLE,
    ),
    "BriaFiboTransformer2DModel": Case(
        config={
            **_JOINT, "num_single_layers": 3, "text_encoder_dim": 8, "axes_dims_rope": (2, 2, 4),
        },
        inputs=_bria_fibo, lists=_DOUBLE_SINGLE,
    ),
    "LongCatImageTransformer2DModel": Case(config=_FLUX, inputs=_packed, lists=_DOUBLE_SINGLE),
    "OvisImageTransformer2DModel": Case(
        config={**_JOINT, "num_single_layers": 3, "axes_dims_rope": (2, 2, 4), "out_channels": 4}, inputs=_packed,
        lists=_DOUBLE_SINGLE,
    ),
    "QwenImageTransformer2DModel": Case(
        config={**_JOINT, "out_channels": 4, "axes_dims_rope": (2, 2, 4)}, inputs=_qwen,
        extra={"controlnet": lambda n, side: {**_qwen(n, side), "controlnet_block_samples": _control(n, side)}},
    ),
    "SD3Transformer2DModel": Case(
        config={
            **_JOINT, "sample_size": 8, "caption_projection_dim": 16, "pooled_projection_dim": WIDTH,
            "out_channels": 4, "pos_embed_max_size": 16, "dual_attention_layers": (1,), "qk_norm": "rms_norm",
        },
        inputs=_sd3,
        extra={
            "controlnet": lambda n, side: {**_sd3(n, side), "block_controlnet_hidden_states": _control(n, side)},
        },
    ),
    "SanaTransformer2DModel": Case(
        config=_SANA, inputs=_picture,
        extra={"controlnet": lambda n, side: {**_picture(n, side), "controlnet_block_samples": _control(n, side)}},
    ),
    "PixArtTransformer2DModel": Case(
        config=_PIXART,
        inputs=lambda n, side: {
            **_picture(n, side), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "DiTTransformer2DModel": Case(
        config={
            **_HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 4, "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_zero", "patch_size": 2, "sample_size": 8, "attention_bias": True,
        },
        inputs=lambda n, side: {
            "hidden_states": n(1, 4, side, side), "timestep": n.time.long(), "class_labels": torch.tensor([3]),
        },
    ),
    "AuraFlowTransformer2DModel": Case(
        config={
            **_HEADS, "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 3,
            "num_single_dit_layers": 4, "caption_projection_dim": 16, "joint_attention_dim": WIDTH,
            "out_channels": 4, "pos_embed_max_size": 256,
        },
        inputs=lambda n, side: {**_picture(n, side), "timestep": n.time / 1000},
        lists=("joint_transformer_blocks", "single_transformer_blocks"),
    ),
    "CogView3PlusTransformer2DModel": Case(
        config={
            **_HEADS, "patch_size": 2, "in_channels": 4, "num_layers": 4, "out_channels": 4,
            "text_embed_dim": WIDTH, "time_embed_dim": 8, "condition_dim": 2, "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        inputs=lambda n, side: {**_picture(n, side), **_sizes(side)},
    ),
    "CogView4Transformer2DModel": Case(
        config={
            **_HEADS, "patch_size": 2, "in_channels": 4, "num_layers": 4, "out_channels": 4,
            "text_embed_dim": WIDTH, "time_embed_dim": 8, "condition_dim": 4,
        },
        inputs=lambda n, side: {**_picture(n, side), **_sizes(side)},
    ),
    "GlmImageTransformer2DModel": Case(
        config={
            **_HEADS, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 4,
            "text_embed_dim": WIDTH, "time_embed_dim": 16, "condition_dim": 8, "prior_vq_quantizer_codebook_size": 64,
        },
        inputs=_glm,
    ),
    "HiDreamImageTransformer2DModel": Case(
        config={
            **_HEADS, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 4,
            "num_single_layers": 4, "caption_channels": [8, 4], "text_emb_dim": 8, "num_routed_experts": 2,
            "num_activated_experts": 2, "axes_dims_rope": (4, 2, 2), "max_resolution": (32, 32),
            "llama_layers": (0, 1, 0, 1, 0, 1, 0, 1), "force_inference_output": True,
        },
        inputs=_hidream, lists=("double_stream_blocks", "single_stream_blocks"),
    ),
    "HunyuanDiT2DModel": Case(
        config={
            **_HEADS, "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 6,
            "cross_attention_dim": WIDTH, "cross_attention_dim_t5": WIDTH, "pooled_projection_dim": 4,
            "hidden_size": 16, "text_len": TEXT, "text_len_t5": TEXT,
        },
        inputs=_hunyuan_dit, lists=("blocks",),
    ),
    "HunyuanImageTransformer2DModel": Case(
        config={
            **_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 3, "num_single_layers": 3,
            "num_refiner_layers": 1, "patch_size": (1, 1), "text_embed_dim": WIDTH, "text_embed_2_dim": WIDTH,
            "rope_axes_dim": (4, 4),
        },
        inputs=_hunyuan_image, lists=_DOUBLE_SINGLE,
    ),
    "LuminaNextDiT2DModel": Case(
        config={
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 4,
            "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 16, "learn_sigma": False, "qk_norm": True,
            "cross_attention_dim": WIDTH,
        },
        inputs=_lumina_next, lists=("layers",),
    ),
    "Lumina2Transformer2DModel": Case(
        config={
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 4,
            "num_refiner_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2), "axes_lens": (64, 64, 64), "cap_feat_dim": WIDTH,
        },
        inputs=lambda n, side: {
            **_picture(n, side), "timestep": n.time / 1000, "encoder_attention_mask": torch.ones(1, TEXT).bool(),
        },
        lists=("layers",),
    ),
    "OmniGenTransformer2DModel": Case(
        config={
            "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32,
            "num_layers": 4, "vocab_size": 16, "in_channels": 4, "time_step_dim": 4,
            "rope_scaling": {"long_factor": [1, 2, 3, 4], "short_factor": [1, 2, 3, 4]}, "pad_token_id": 0,
        },
        inputs=_omnigen, lists=("layers",),
    ),
    "PRXTransformer2DModel": Case(
        config={
            "in_channels": 4, "patch_size": 2, "context_in_dim": WIDTH, "hidden_size": 16, "mlp_ratio": 2.0,
            "num_heads": 2, "depth": 4, "axes_dim": [4, 4],
        },
        inputs=lambda n, side: {**_picture(n, side), "timestep": n.time / 1000}, lists=("blocks",),
    ),
    "ZImageTransformer2DModel": Case(
        config={
            "in_channels": 4, "dim": 16, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 1, "n_kv_heads": 1,
            "cap_feat_dim": WIDTH, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32],
        },
        inputs=_z_image, lists=("layers",),
    ),
    "UVit2DModel": Case(
        config={
            "hidden_size": 16, "cond_embed_dim": 8, "micro_cond_encode_dim": 2, "micro_cond_embed_dim": 10,
            "encoder_hidden_size": WIDTH, "vocab_size": 128, "codebook_size": 96, "in_channels": 8,
            "block_out_channels": 8, "num_res_blocks": 1, "downsample": True, "upsample": True,
            "block_num_heads": 1, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32,
            "sample_size": 8,
        },
        inputs=_amused, lists=("transformer_layers",),
    ),
}
