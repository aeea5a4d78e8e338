"""Cases: image models."""

from __future__ import annotations

from typing import Any

import torch

from tests.models.native.harness import Case, drift, moment, noise

GRIDS = ((4, 4), (4, 6))


def _config(cls: type, **arch: Any) -> Any:
    config = cls()
    config.update_model_arch(arch)
    return config


def _flux() -> Any:
    from sglang.multimodal_gen.configs.models.dits.flux import FluxConfig
    from sglang.multimodal_gen.runtime.models.dits.flux import FluxTransformer2DModel

    return FluxTransformer2DModel(
        _config(
            FluxConfig, in_channels=8, out_channels=8, num_layers=4, num_single_layers=4, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
        ),
        {},
    )


def _rope(tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(tokens).float()[:, None] * torch.linspace(1.0, 0.1, dim // 2)[None]
    return angles.cos(), angles.sin()


def _flux_inputs(size: int, step: int) -> dict[str, Any]:
    tokens = GRIDS[size][0] * GRIDS[size][1]
    return {
        "hidden_states": drift(1, step, 1, tokens, 8), "encoder_hidden_states": noise(3, 1, 5, 16),
        "pooled_projections": noise(4, 1, 16), "timestep": moment(step), "guidance": torch.tensor([3.5]),
        "freqs_cis": _rope(5 + tokens, 16),
    }


def _flux2() -> Any:
    from sglang.multimodal_gen.configs.models.dits.flux import FluxConfig
    from sglang.multimodal_gen.runtime.models.dits.flux_2 import Flux2Transformer2DModel

    config = FluxConfig()
    config.update_model_arch({
        "in_channels": 8, "out_channels": 8, "num_layers": 4, "num_single_layers": 4, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4, 4), "mlp_ratio": 2.0,
        "timestep_guidance_channels": 16, "rope_theta": 2000, "eps": 1e-6,
    })
    return Flux2Transformer2DModel(config, {})


def _flux2_inputs(size: int, step: int) -> dict[str, Any]:
    inputs = _flux_inputs(size, step)
    del inputs["pooled_projections"]
    return inputs


def _qwen(**more: Any) -> Any:
    from sglang.multimodal_gen.configs.models.dits.qwenimage import QwenImageDitConfig
    from sglang.multimodal_gen.runtime.models.dits.qwen_image import QwenImageTransformer2DModel

    config = _config(
        QwenImageDitConfig, in_channels=8, out_channels=8, num_layers=4, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 6, 6), **more,
    )
    return QwenImageTransformer2DModel(config, {})


def _qwen_inputs(size: int, step: int, edit: bool = False) -> dict[str, Any]:
    from sglang.multimodal_gen.configs.pipeline_configs.qwen_image import QwenImagePipelineConfig
    from sglang.multimodal_gen.runtime.models.dits.qwen_image import QwenEmbedRope

    height, width = GRIDS[size]
    shapes = [[(1, height, width)] + ([(1, 4, 4)] if edit else [])]
    rotary = QwenEmbedRope(theta=10000, axes_dim=[4, 6, 6], scale_rope=True)
    freqs_cis, freqs_complex = QwenImagePipelineConfig.get_freqs_cis(
        shapes, [3], rotary, torch.device("cpu"), torch.float32
    )
    tokens = sum(h * w for _, h, w in shapes[0])
    return {
        "hidden_states": drift(1, step, 1, tokens, 8), "encoder_hidden_states": noise(3, 1, 3, 12),
        "timestep": moment(step), "img_shapes": shapes, "txt_seq_lens": [3], "freqs_cis": freqs_cis,
        "freqs_complex": freqs_complex,
    }


def _zimage() -> Any:
    from sglang.multimodal_gen.configs.models.dits.zimage import ZImageDitConfig
    from sglang.multimodal_gen.runtime.models.dits.zimage import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        _config(
            ZImageDitConfig, in_channels=8, dim=32, num_layers=4, n_refiner_layers=1, num_attention_heads=2,
            n_kv_heads=2, cap_feat_dim=16, axes_dims=(4, 6, 6), axes_lens=(256, 64, 64),
        ),
        {},
    )


def _zimage_inputs(size: int, step: int) -> dict[str, Any]:
    height, width = (8, 8) if size == 0 else (8, 16)
    image, text = height * width // 4, 32
    image = -(-image // 32) * 32
    return {
        "hidden_states": [drift(1, step, 8, 1, height, width)], "encoder_hidden_states": [noise(3, text, 16)],
        "timestep": moment(step), "freqs_cis": (_rope(text, 16), _rope(image, 16)),
    }


def _glm() -> Any:
    from sglang.multimodal_gen.configs.models.dits.glmimage import GlmImageDitConfig
    from sglang.multimodal_gen.runtime.models.dits.glm_image import GlmImageTransformer2DModel

    return GlmImageTransformer2DModel(
        _config(
            GlmImageDitConfig, num_layers=4, attention_head_dim=16, num_attention_heads=2, condition_dim=8,
            prior_vq_quantizer_codebook_size=32, text_embed_dim=24, time_embed_dim=16, in_channels=8, out_channels=8,
        ),
        {},
    )


def _glm_inputs(size: int, step: int) -> dict[str, Any]:
    height, width = (8, 8) if size == 0 else (8, 12)
    tokens = height * width // 4
    return {
        "hidden_states": drift(1, step, 1, 8, height, width), "encoder_hidden_states": noise(3, 1, 3, 24),
        "prior_token_id": torch.arange(tokens)[None] % 32, "prior_token_drop": torch.zeros(1, tokens).bool(),
        "timestep": moment(step), "target_size": torch.tensor([[64.0, 64.0]]), "crop_coords": torch.zeros(1, 2),
    }


def _sd3() -> Any:
    from sglang.multimodal_gen.configs.models.dits.stablediffusion3 import StableDiffusion3TransformerConfig
    from sglang.multimodal_gen.runtime.models.dits.stablediffusion3 import SD3Transformer2DModel

    return SD3Transformer2DModel(
        _config(
            StableDiffusion3TransformerConfig, sample_size=16, in_channels=4, out_channels=4, num_layers=4,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=32,
            pooled_projection_dim=16, pos_embed_max_size=16, dual_attention_layers=(0, 1), qk_norm="rms_norm",
        ),
    )


def _sd3_inputs(size: int, step: int) -> dict[str, Any]:
    height, width = (8, 8) if size == 0 else (8, 12)
    return {
        "hidden_states": drift(1, step, 1, 4, height, width), "encoder_hidden_states": noise(3, 1, 5, 16),
        "pooled_projections": noise(4, 1, 16), "timestep": moment(step),
    }


CASES: dict[str, Case] = {
    "FluxTransformer2DModel": Case(build=_flux, inputs=_flux_inputs),
    "Flux2Transformer2DModel": Case(build=_flux2, inputs=_flux2_inputs),
    "QwenImageTransformer2DModel": Case(build=_qwen, inputs=_qwen_inputs),
    "QwenImageTransformer2DModel-edit": Case(
        build=lambda: _qwen(zero_cond_t=True), inputs=lambda size, step: _qwen_inputs(size, step, edit=True)
    ),
    "ZImageTransformer2DModel": Case(build=_zimage, inputs=_zimage_inputs),
    "GlmImageTransformer2DModel": Case(build=_glm, inputs=_glm_inputs),
    "SD3Transformer2DModel": Case(build=_sd3, inputs=_sd3_inputs),
}
