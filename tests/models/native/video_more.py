"""Cases: further video, audio and 3D models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention.flex_attention import create_mask

from tests.models.native.harness import Case, drift, moment, noise
from tests.models.native.image import _config
from tests.models.native.video import SIZES


def _volume_inputs(size: int, step: int, channels: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": drift(1, step, 1, channels, *SIZES[size]), "encoder_hidden_states": noise(3, 1, 6, text),
        "timestep": moment(step),
    }


def _cosmos3(multiview: bool = False) -> Any:
    from sglang.multimodal_gen.configs.models.dits.cosmos3video import Cosmos3VideoConfig
    from sglang.multimodal_gen.runtime.models.dits import cosmos3_multiview, cosmos3video

    arch = {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "intermediate_size": 64, "latent_channel": 4, "out_channels": 4,
        "mrope_section": (4, 2, 2), "vocab_size": 64, "frequency_embedding_size": 16,
    }
    if not multiview:
        return cosmos3video.Cosmos3OmniTransformer(_config(Cosmos3VideoConfig, **arch), arch)
    rig = {"num_embeddings": 4, "camera_ids": {}, "lidar_id": 3}
    contract = SimpleNamespace(lidar=None, lidar_latent_patch_size_hw=None, rig_view_embedding=rig)
    with patch.object(cosmos3_multiview, "parse_multiview_deployment_config", return_value=contract):
        return cosmos3_multiview.Cosmos3MultiviewTransformer(
            _config(Cosmos3VideoConfig, **arch), arch | {"backbone_type": "cosmos3_multiview"}
        )


def _cosmos3_fresh(model: Any) -> dict[str, Any]:
    model._ensure_cache_dicts()
    model.cached_kv.clear()
    model.cached_gen_rope_inputs.clear()
    return {}


def _cosmos3_inputs(size: int, step: int) -> dict[str, Any]:
    return _volume_inputs(size, step, 4, 8) | {
        "text_ids": torch.arange(6)[None], "text_mask": torch.ones(1, 6), "fps": 24.0,
    }


def _kandinsky6(audio: bool) -> Any:
    from sglang.multimodal_gen.configs.models.dits.kandinsky6 import Kandinsky6VideoAudioConfig
    from sglang.multimodal_gen.runtime.models.dits.kandinsky6 import Kandinsky6Transformer3DModel

    arch = {
        "model_dim": 32, "time_dim": 16, "ff_dim": 64, "axes_dims": (8, 4, 4), "in_visual_dim": 4,
        "out_visual_dim": 4, "in_text_dim": 8, "in_text_dim2": 8, "in_audio_dim": 4, "num_text_blocks": 1,
        "num_visual_blocks": 4, "patch_size": (1, 1, 1), "visual_cond": False,
        "visual_token_type_num_embeddings": 0, "is_multimodal": audio, "model_dim_a": 16, "time_dim_a": 16,
        "ff_dim_a": 32, "axes_dims_a": (4, 2, 2),
    }
    return Kandinsky6Transformer3DModel(_config(Kandinsky6VideoAudioConfig, **arch), {})


def _kandinsky6_inputs(size: int, step: int, audio: bool = False) -> dict[str, Any]:
    frames, height, width = (2, 3, 3) if size == 0 else (2, 3, 5)
    inputs = {
        "hidden_states": drift(1, step, 1, frames, height, width, 4), "encoder_hidden_states": noise(3, 1, 3, 8),
        "pooled_projections": noise(4, 1, 8), "timestep": moment(step),
        "visual_rope_pos": [torch.arange(n) for n in (frames, height, width)], "text_rope_pos": torch.arange(3),
    }
    return inputs | ({"hidden_states_audio": drift(5, step, 1, 5, 4)} if audio else {})


def _kandinsky6_sr() -> Any:
    from sglang.multimodal_gen.configs.models.dits.kandinsky6_sr import Kandinsky6SRDitConfig
    from sglang.multimodal_gen.runtime.models.dits.kandinsky6_sr import Kandinsky6SRTransformer3DModel

    arch = {
        "in_visual_dim": 4, "in_text_dim": 8, "in_text_dim2": 8, "time_dim": 16, "out_visual_dim": 12,
        "patch_size": [1, 2, 2], "model_dim": 32, "ff_dim": 64, "num_text_blocks": 0, "num_visual_blocks": 4,
        "axes_dims": [8, 4, 4], "visual_cond": False, "instruct_type": "noise", "use_text": False,
        "sr_params": {"visual_size": [512], "scale_factor": {"512": [1.0, 1.0, 1.0]}},
    }
    return Kandinsky6SRTransformer3DModel(_config(Kandinsky6SRDitConfig, **arch), arch)


def _kandinsky6_sr_inputs(size: int, step: int) -> dict[str, Any]:
    frames, height, width = (2, 4, 4) if size == 0 else (2, 4, 8)
    return {
        "hidden_states": drift(1, step, 1, frames, height, width, 4), "timestep": moment(step),
        "visual_rope_pos": [torch.arange(n) for n in (frames, height // 2, width // 2)],
    }


def _lingbot_video() -> Any:
    from sglang.multimodal_gen.configs.models.dits.lingbot_video_moe import LingBotVideoMoEConfig
    from sglang.multimodal_gen.runtime.models.dits.lingbot_video_moe import LingBotVideoTransformer3DModel

    return LingBotVideoTransformer3DModel(
        _config(
            LingBotVideoMoEConfig, in_channels=4, out_channels=4, hidden_size=32, num_attention_heads=2, depth=4,
            intermediate_size=64, text_dim=12, freq_dim=16, axes_dims=(4, 6, 6), mlp_only_layers=(0, 1, 2, 3),
        ),
        {},
    )


def _lingbot_world() -> Any:
    from sglang.multimodal_gen.configs.models.dits.lingbot_world import LingBotWorldVideoConfig
    from sglang.multimodal_gen.runtime.models.dits.lingbot_world import LingBotWorldTransformer3DModel

    return LingBotWorldTransformer3DModel(
        _config(
            LingBotWorldVideoConfig, num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4,
            text_dim=12, freq_dim=16, ffn_dim=64, num_layers=4,
        ),
        {},
    )


def _sana_video() -> Any:
    from sglang.multimodal_gen.configs.models.dits.sana_video import SanaVideoConfig
    from sglang.multimodal_gen.runtime.models.dits.sana_video import SanaVideoTransformer3DModel

    return SanaVideoTransformer3DModel(
        _config(
            SanaVideoConfig, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=12,
            num_attention_heads=2, num_cross_attention_heads=2, cross_attention_head_dim=12,
            cross_attention_dim=24, caption_channels=12,
        ),
        {},
    )


def _sana_video2() -> Any:
    from sglang.multimodal_gen.configs.models.dits.sana_video2 import SanaVideo2ArchConfig, SanaVideo2Config
    from sglang.multimodal_gen.runtime.models.dits.sana_video2 import SanaVideo2Transformer3DModel

    arch = SanaVideo2ArchConfig(
        hidden_size=24, depth=4, num_heads=2, linear_head_dim=12, softmax_head_dim=24, in_channels=4,
        caption_channels=8, model_max_length=6, mlp_ratio=2, attn_res_block_size=2,
    )
    return SanaVideo2Transformer3DModel(SanaVideo2Config(arch_config=arch))


def _sana_wm() -> Any:
    from sglang.multimodal_gen.configs.models.dits.sana_wm import SanaWMArchConfig, SanaWMConfig
    from sglang.multimodal_gen.runtime.models.dits.sana_wm import SanaWMTransformer3DModel

    arch = SanaWMArchConfig(
        in_channels=8, out_channels=8, num_layers=4, num_attention_heads=2, attention_head_dim=16,
        linear_head_dim=16, num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
        caption_channels=32, model_max_length=8, softmax_every_n=4, update_rule="torch_recurrent",
        cam_update_rule="torch_recurrent", chunk_size=None,
    )
    return SanaWMTransformer3DModel(SanaWMConfig(arch_config=arch))


def _hunyuan3d() -> Any:
    from sglang.multimodal_gen.configs.models.dits.hunyuan3d import Hunyuan3DDiTConfig
    from sglang.multimodal_gen.runtime.models.dits.hunyuan3d import Hunyuan3D2DiT

    return Hunyuan3D2DiT(
        _config(
            Hunyuan3DDiTConfig, in_channels=8, hidden_size=32, num_attention_heads=2, num_layers=4,
            num_single_layers=4, context_in_dim=12, axes_dim=(16,),
        ),
        {},
    )


def _hunyuan3d_inputs(size: int, step: int) -> dict[str, Any]:
    tokens = (16, 24)[size]
    return {"x": drift(1, step, 1, tokens, 8), "t": moment(step) / 1000, "contexts": {"main": noise(3, 1, 5, 12)}}


def minimax_h3(latents: int = 4, audio_latents: int = 4) -> Any:
    """A tiny MiniMax-H3; ComfyUI's stage packs 24 and 32 channels."""
    from sglang.multimodal_gen.configs.models.dits.minimax_h3 import MiniMaxH3DiTArchConfig, MiniMaxH3DiTConfig
    from sglang.multimodal_gen.runtime.models.dits import minimax_h3

    arch = MiniMaxH3DiTArchConfig(
        num_layers=4, token_refiner_num_layers=1, hidden_size=64, num_attention_heads=2, attention_head_dim=32,
        ffn_hidden_size=64, latents_dim=latents, audio_latents_dim=audio_latents, text_dim=12, timestep_input_dim=16,
        time_embed_hidden_size=32, time_embed_dim=16, adaln_out_features=18 * 64, final_adaln_out_features=2 * 64,
        rope_inv_freq_len=4,
    )
    model = minimax_h3.MiniMaxH3DiTModel(MiniMaxH3DiTConfig(arch_config=arch), {})
    for name, parameter in model.named_parameters():
        if name not in minimax_h3.MINIMAX_H3_FP32_PARAM_NAMES:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.rope.inv_freq.copy_(torch.linspace(1.0, 0.1, 4))
    return model


def _minimax_h3_inputs(size: int, step: int) -> dict[str, Any]:
    text, audio, video = 5, 3, (8, 12)[size]
    total = text + audio + video
    places = torch.arange(total)
    lengths = torch.tensor([0, total], dtype=torch.int32)
    return {
        "x": drift(1, step, 1, total, 16), "audio_x": drift(5, step, 1, total, 4),
        "img_position_ids": places.view(1, -1, 1).expand(1, -1, 3), "unique_timesteps": moment(step) / 1000,
        "inverse_indices": torch.zeros(total, dtype=torch.long), "update_mask": torch.ones(video),
        "token_tags": torch.tensor([0] * text + [2] * audio + [1] * video), "prompt_embeds": noise(3, text, 12),
        "img_pos_info": {"position_ids": places[text + audio :]},
        "audio_pos_info": {"position_ids": places[text : text + audio]},
        "text_pos_info": {"position_ids": places[:text]},
        "img_pos_for_infer_output_info": {"position_ids": places[text + audio :]},
        "packed_seq_params": {"cu_seqlens_q": lengths, "max_seqlen_q": total},
        "refiner_packed_seq_params": {"cu_seqlens_q": torch.tensor([0, text]), "max_seqlen_q": text},
    }


def _dense_attention(query: Any, key: Any, value: Any, block_mask: Any, score_mod: Any) -> torch.Tensor:
    """In place of compiled flex attention; every padded query sees the first key, as no row may be empty."""
    mask = create_mask(block_mask.mask_mod, None, None, query.shape[2], key.shape[2], device="cpu")
    mask[..., 0] = True
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _wan_animate() -> Any:
    from sglang.multimodal_gen.configs.models.dits.wan_animate_2 import WanAnimate2Config
    from sglang.multimodal_gen.runtime.models.dits import wan_animate_2_block
    from sglang.multimodal_gen.runtime.models.dits.wan_animate_2 import WanAnimate2Transformer3DModel

    wan_animate_2_block._flex_attention_compiled = _dense_attention
    return WanAnimate2Transformer3DModel(
        _config(
            WanAnimate2Config, num_attention_heads=2, attention_head_dim=24, text_dim=16, freq_dim=16, ffn_dim=64,
            num_layers=12, image_dim=16, added_kv_proj_dim=48, text_len=6,
        ),
        {},
    )


def _wan_animate_clip(size: int) -> Any:
    from sglang.multimodal_gen.runtime.models.dits.wan_animate_2_clip_conditioning import WanAnimate2ClipConditioning

    height, width = ((4, 4), (4, 8))[size]
    grid = (2, height // 2, width // 2)
    return WanAnimate2ClipConditioning(
        reference_video_latents=noise(7, 16, 1, height, width), generation_video_grid_sizes=grid,
        reference_video_frame_0_image_embeddings=noise(8, 1, 257, 16),
        reference_video_condition=noise(9, 20, 1, height, width), prompt_ref_embeddings=noise(10, 4, 16),
        generation_condition=noise(11, 20, 2, height, width), reference_video_grid_sizes=(1, *grid[1:]),
        full_clip_grid_sizes=grid, num_frames=5, init_noise=noise(12, 16, 2, height, width),
    )


def _wan_animate_fresh(model: Any) -> dict[str, Any]:
    from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context

    with set_forward_context(current_timestep=0, attn_metadata=None):
        return {"keys": [model.build_reference_kv(clip_cond=_wan_animate_clip(size)) for size in (0, 1)]}


def _wan_animate_inputs(size: int, step: int, keys: Any) -> dict[str, Any]:
    clip = _wan_animate_clip(size)
    return {
        "hidden_states": drift(1, step, *clip.init_noise.shape), "encoder_hidden_states": noise(3, 6, 16),
        "timestep": moment(step), "encoder_hidden_states_image": noise(4, 1, 257, 16), "reference_kv": keys[size],
        "clip_cond": clip,
    }


CASES: dict[str, Case] = {
    "MiniMaxH3DiTModel": Case(build=minimax_h3, inputs=_minimax_h3_inputs, dtype=None),
    "WanAnimate2Transformer3DModel": Case(
        build=_wan_animate, inputs=_wan_animate_inputs, fresh=_wan_animate_fresh
    ),
    "WanAnimate2Transformer3DModel-uncond": Case(
        build=_wan_animate, fresh=_wan_animate_fresh,
        inputs=lambda size, step, keys: _wan_animate_inputs(size, step, keys) | {"is_unconditional": True},
    ),
    "Cosmos3OmniTransformer": Case(build=_cosmos3, inputs=_cosmos3_inputs, fresh=_cosmos3_fresh),
    "Cosmos3MultiviewTransformer": Case(
        build=lambda: _cosmos3(multiview=True), inputs=_cosmos3_inputs, fresh=_cosmos3_fresh
    ),
    "Kandinsky6Transformer3DModel": Case(build=lambda: _kandinsky6(audio=False), inputs=_kandinsky6_inputs),
    "Kandinsky6Transformer3DModel-audio": Case(
        build=lambda: _kandinsky6(audio=True), inputs=lambda size, step: _kandinsky6_inputs(size, step, audio=True)
    ),
    "Kandinsky6SRTransformer3DModel": Case(build=_kandinsky6_sr, inputs=_kandinsky6_sr_inputs),
    "LingBotVideoTransformer3DModel": Case(
        build=_lingbot_video, inputs=lambda size, step: _volume_inputs(size, step, 4, 12)
    ),
    "LingBotWorldTransformer3DModel": Case(
        build=_lingbot_world, inputs=lambda size, step: _volume_inputs(size, step, 4, 12)
    ),
    "SanaVideoTransformer3DModel": Case(
        build=_sana_video, inputs=lambda size, step: _volume_inputs(size, step, 4, 12)
    ),
    "SanaVideo2Transformer3DModel": Case(
        build=_sana_video2, inputs=lambda size, step: _volume_inputs(size, step, 4, 8)
    ),
    "SanaWMTransformer3DModel": Case(build=_sana_wm, inputs=lambda size, step: _volume_inputs(size, step, 8, 32)),
    "Hunyuan3D2DiT": Case(build=_hunyuan3d, inputs=_hunyuan3d_inputs),
}
