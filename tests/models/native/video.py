"""Cases: video models."""

from __future__ import annotations

from typing import Any

import torch

from tests.models.native.harness import Case, drift, moment, noise
from tests.models.native.image import _config

SIZES = ((3, 4, 4), (3, 4, 8))


def _wan(image: bool = False) -> Any:
    from sglang.multimodal_gen.configs.models.dits.wanvideo import WanVideoConfig
    from sglang.multimodal_gen.runtime.models.dits.wanvideo import WanTransformer3DModel

    more = {"image_dim": 16, "added_kv_proj_dim": 48} if image else {}
    return WanTransformer3DModel(
        _config(
            WanVideoConfig, num_attention_heads=2, attention_head_dim=24, in_channels=8 if image else 4,
            out_channels=4, text_dim=16, freq_dim=16, ffn_dim=64, num_layers=4, **more,
        ),
        {},
    )


def _wan_inputs(size: int, step: int, channels: int = 4) -> dict[str, Any]:
    return {
        "hidden_states": drift(1, step, 1, channels, *SIZES[size]), "encoder_hidden_states": noise(3, 1, 6, 16),
        "timestep": moment(step),
    }


def _wan_image_inputs(size: int, step: int) -> dict[str, Any]:
    return _wan_inputs(size, step, 8) | {"encoder_hidden_states_image": [noise(5, 1, 257, 16)]}


def _wan_ti2v_inputs(size: int, step: int) -> dict[str, Any]:
    frames, height, width = SIZES[size]
    tokens = frames * height * width // 4
    times = moment(step).repeat(tokens)
    times[: height * width // 4] = 0.0
    return _wan_inputs(size, step) | {"timestep": times[None]}


def _hunyuan() -> Any:
    from sglang.multimodal_gen.configs.models.dits.hunyuanvideo import HunyuanVideoConfig
    from sglang.multimodal_gen.runtime.models.dits.hunyuanvideo import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        _config(
            HunyuanVideoConfig, num_attention_heads=2, attention_head_dim=16, num_layers=4, num_single_layers=4,
            num_refiner_layers=1, rope_axes_dim=(4, 6, 6), text_embed_dim=16, pooled_projection_dim=8,
            in_channels=4, out_channels=4, guidance_embeds=True,
        ),
        {},
    )


def _hunyuan_inputs(size: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": drift(1, step, 1, 4, *SIZES[size]), "encoder_hidden_states": noise(3, 1, 6, 16),
        "timestep": moment(step), "guidance": torch.tensor([6016.0]),
    }


def _ltx2() -> Any:
    from sglang.multimodal_gen.configs.models.dits.ltx_2 import LTX2ArchConfig, LTX2Config
    from sglang.multimodal_gen.runtime.models.dits.ltx_2 import LTX2VideoTransformer3DModel

    arch = LTX2ArchConfig(
        num_layers=4, num_attention_heads=2, attention_head_dim=32, in_channels=16, out_channels=16,
        cross_attention_dim=64, caption_channels=64, audio_num_attention_heads=2, audio_attention_head_dim=16,
        audio_in_channels=16, audio_out_channels=16, audio_cross_attention_dim=32,
    )
    return LTX2VideoTransformer3DModel(LTX2Config(arch_config=arch), hf_config={})


def _ltx2_inputs(size: int, step: int) -> dict[str, Any]:
    frames, height, width = (2, 4, 4) if size == 0 else (2, 4, 6)
    return {
        "hidden_states": drift(1, step, 1, frames * height * width, 16),
        "audio_hidden_states": drift(5, step, 1, 5, 16), "encoder_hidden_states": noise(3, 1, 6, 64),
        "audio_encoder_hidden_states": noise(4, 1, 6, 64), "timestep": moment(step), "num_frames": frames,
        "height": height, "width": width, "audio_num_frames": 5, "return_latents": False,
    }


CASES: dict[str, Case] = {
    "WanTransformer3DModel": Case(build=_wan, inputs=_wan_inputs),
    "WanTransformer3DModel-i2v": Case(build=lambda: _wan(image=True), inputs=_wan_image_inputs),
    "WanTransformer3DModel-ti2v": Case(build=_wan, inputs=_wan_ti2v_inputs),
    "HunyuanVideoTransformer3DModel": Case(build=_hunyuan, inputs=_hunyuan_inputs),
    "LTX2VideoTransformer3DModel": Case(build=_ltx2, inputs=_ltx2_inputs),
}
