"""Cases: further image models."""

from __future__ import annotations

from typing import Any

import torch

from tests.models.native.harness import Case, drift, moment, noise
from tests.models.native.image import GRIDS, _config, _rope


def _flux3_image() -> Any:
    from sglang.multimodal_gen.configs.pipeline_configs.flux3_image import flux3_image_dit_config
    from sglang.multimodal_gen.runtime.models.dits.flux3_image import Flux3ImageDiT

    return Flux3ImageDiT(
        flux3_image_dit_config(
            hidden_size=32, num_attention_heads=2, depth=1, depth_single_blocks=4, context_in_dim=16,
            axes_dim=(4, 4, 4, 4),
        )
    )


def _flux3_image_inputs(size: int, step: int) -> dict[str, Any]:
    from sglang.multimodal_gen.runtime.models.dits.flux3_image import TEXT, pack

    tokens = GRIDS[size][0] * GRIDS[size][1]
    samples = [
        {
            "image": (drift(1 + sample, step, tokens, 128).bfloat16(), noise(4, tokens, 4).abs() * 8),
            "image_cond": None,
            TEXT: (noise(3 + sample, 3 + sample, 16).bfloat16(), noise(6, 3 + sample, 4).abs()),
        }
        for sample in range(2)
    ]
    packed = pack(samples, {"image": 128, "image_cond": 128, TEXT: 16})
    packed.timesteps["image"] = torch.full((2 * tokens,), 0.9 - 0.1 * step).bfloat16()
    return {"packed": packed}


def _qwen21() -> Any:
    from sglang.multimodal_gen.configs.models.dits.qwenimage21 import QwenImage21DitConfig
    from sglang.multimodal_gen.runtime.models.dits.qwen_image21 import QwenImage21Transformer2DModel

    return QwenImage21Transformer2DModel(
        _config(
            QwenImage21DitConfig, in_channels=8, out_channels=8, num_layers=4, attention_head_dim=16,
            num_attention_heads=2, context_in_dim=12, axes_dims_rope=(4, 6, 6),
        ),
        {},
    )


def _qwen21_inputs(size: int, step: int, prefix_caches: Any) -> dict[str, Any]:
    from sglang.multimodal_gen.runtime.models.dits.qwen_image21 import build_layout

    height, width = GRIDS[size]
    layout = build_layout([False] * 5, [(1, height, width)], (4, 6, 6), torch.device("cpu"))
    return {
        "hidden_states": drift(1, step, 1, height * width, 8), "encoder_hidden_states": noise(3, 1, 5, 12),
        "timestep": moment(step), "layouts": [layout], "prefix_caches": prefix_caches,
    }


def _ming() -> Any:
    from sglang.multimodal_gen.configs.models.dits.ming_image import MingImageDitConfig
    from sglang.multimodal_gen.runtime.models.dits.ming_image import MingImageTransformer2DModel

    return MingImageTransformer2DModel(
        _config(
            MingImageDitConfig, in_channels=8, out_channels=8, dim=32, n_layers=4, n_refiner_layers=1, n_heads=2,
            n_kv_heads=2, cap_feat_dim=16, axes_dims=(4, 6, 6), axes_lens=(256, 64, 64),
            alignment_padding_mode="learned", multi_frame_output=True,
        ),
        {},
    )


def _ming_inputs(size: int, step: int) -> dict[str, Any]:
    height, width = (8, 8) if size == 0 else (8, 16)
    return {
        "hidden_states": drift(1, step, 1, 8, 1, height, width), "encoder_hidden_states": noise(3, 1, 7, 16),
        "timestep": moment(step), "direct_embeddings": noise(4, 1, 3, 32),
    }


def _longcat() -> Any:
    from sglang.multimodal_gen.configs.models.dits.longcat_image import LongCatImageDitConfig
    from sglang.multimodal_gen.runtime.models.dits.longcat_image import LongCatImageTransformer2DModel

    return LongCatImageTransformer2DModel(
        _config(
            LongCatImageDitConfig, in_channels=8, num_layers=4, num_single_layers=4, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=[4, 6, 6],
        ),
        {},
    )


def _longcat_inputs(size: int, step: int) -> dict[str, Any]:
    height, width = GRIDS[size]
    grid = torch.stack(
        torch.meshgrid(torch.ones(1).long(), torch.arange(height), torch.arange(width), indexing="ij"), -1
    )
    return {
        "hidden_states": drift(1, step, 1, height * width, 8), "encoder_hidden_states": noise(3, 1, 5, 16),
        "timestep": moment(step), "img_ids": grid.reshape(-1, 3).float(), "txt_ids": torch.zeros(5, 3),
    }


def _anima() -> Any:
    from sglang.multimodal_gen.configs.models.dits.anima import AnimaDiTConfig
    from sglang.multimodal_gen.runtime.models.dits.anima import AnimaTransformer3DModel

    return AnimaTransformer3DModel(
        _config(
            AnimaDiTConfig, in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
            num_layers=4, mlp_ratio=2.0, text_embed_dim=32, adaln_lora_dim=8, max_size=(16, 24, 24),
        ),
        {},
    )


def _anima_inputs(size: int, step: int) -> dict[str, Any]:
    height, width = (8, 8) if size == 0 else (8, 12)
    return {
        "hidden_states": drift(1, step, 1, 4, 1, height, width), "encoder_hidden_states": noise(3, 1, 7, 32),
        "timestep": moment(step),
    }


def _ernie() -> Any:
    from sglang.multimodal_gen.configs.models.dits.ernie_image import ErnieImageDitConfig
    from sglang.multimodal_gen.runtime.models.dits.ernie_image import ErnieImageTransformer2DModel

    return ErnieImageTransformer2DModel(
        _config(
            ErnieImageDitConfig, in_channels=8, out_channels=8, num_layers=4, attention_head_dim=16,
            num_attention_heads=2, ffn_hidden_size=64, text_in_dim=12, rope_axes_dim=(4, 6, 6),
        ),
        {},
    )


def _plane_inputs(size: int, step: int, channels: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": drift(1, step, 1, channels, *GRIDS[size]), "encoder_hidden_states": noise(3, 1, 5, text),
        "timestep": moment(step),
    }


def _krea2() -> Any:
    from sglang.multimodal_gen.configs.models.dits.krea2 import Krea2DitConfig
    from sglang.multimodal_gen.runtime.models.dits.krea2 import Krea2Transformer2DModel

    return Krea2Transformer2DModel(
        _config(
            Krea2DitConfig, features=32, tdim=16, txtdim=16, heads=2, kvheads=1, multiplier=2, layers=4, patch=2,
            channels=4, txtlayers=3, txtheads=2, txtkvheads=2, axes_dims=(4, 6, 6),
        ),
        {},
    )


def _krea2_inputs(size: int, step: int) -> dict[str, Any]:
    tokens = GRIDS[size][0] * GRIDS[size][1]
    places = torch.arange(5 + tokens).float()
    return {
        "hidden_states": drift(1, step, 1, tokens, 16), "encoder_hidden_states": noise(3, 1, 5, 3, 16),
        "timestep": moment(step) / 1000, "pos": places[None, :, None].expand(1, -1, 3),
    }


def _ideogram() -> Any:
    from sglang.multimodal_gen.configs.models.dits.ideogram import Ideogram4DistilledDiTConfig
    from sglang.multimodal_gen.runtime.models.dits.ideogram import Ideogram4Transformer2DModel

    model = Ideogram4Transformer2DModel(
        _config(
            Ideogram4DistilledDiTConfig, adaln_dim=16, attention_head_dim=16, in_channels=8, intermediate_size=32,
            llm_features_dim=24, mrope_section=(4, 2, 2), num_attention_heads=2, num_layers=4,
        ),
        {},
    )
    model.post_load_weights()
    return model


def _ideogram_inputs(size: int, step: int) -> dict[str, Any]:
    from sglang.multimodal_gen.runtime.models.dits.ideogram import LLM_TOKEN_INDICATOR, OUTPUT_IMAGE_INDICATOR

    tokens = GRIDS[size][0] * GRIDS[size][1]
    total = 3 + tokens
    return {
        "x": drift(1, step, 1, total, 8), "t": moment(step) / 1000, "llm_features": noise(3, 1, total, 24),
        "position_ids": torch.arange(total).view(1, total, 1).expand(1, total, 3),
        "segment_ids": torch.ones(1, total, dtype=torch.long),
        "indicator": torch.tensor([[LLM_TOKEN_INDICATOR] * 3 + [OUTPUT_IMAGE_INDICATOR] * tokens]),
    }


def _sana() -> Any:
    from sglang.multimodal_gen.configs.models.dits.sana import SanaConfig
    from sglang.multimodal_gen.runtime.models.dits.sana import SanaTransformer2DModel

    return SanaTransformer2DModel(
        _config(
            SanaConfig, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=2,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        ),
        {},
    )


def _moss() -> Any:
    from sglang.multimodal_gen.configs.models.dits.moss_image import MOSSImageArchConfig, MOSSImageDiTConfig
    from sglang.multimodal_gen.runtime.models.dits.moss_image import MOSSImageTransformer

    arch = MOSSImageArchConfig(
        dim=64, ffn_dim=128, num_heads=2, num_layers=4, text_dim=12, freq_dim=16, latent_channels=8
    )
    return MOSSImageTransformer(MOSSImageDiTConfig(arch_config=arch))


def _moss_inputs(size: int, step: int) -> dict[str, Any]:
    # Two prompts of different length: the model runs its layers once for each.
    return {
        "hidden_states": drift(1, step, 2, 8, *GRIDS[size]), "timestep": moment(step),
        "encoder_hidden_states": noise(3, 2, 5, 12),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    }


def _llada() -> Any:
    from sglang.multimodal_gen.configs.models.dits.llada_image import LLaDAImageDitConfig
    from sglang.multimodal_gen.runtime.models.dits.llada_image import LLaDAImageTransformer2DModel

    arch = {
        "in_channels": 8, "dim": 32, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 12,
        "semantic_feat_dim": 12, "axes_dims": (4, 6, 6), "axes_lens": (256, 64, 64),
    }
    return LLaDAImageTransformer2DModel(_config(LLaDAImageDitConfig, **arch), arch)


def _llada_inputs(size: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": drift(1, step, 1, 8, *GRIDS[size]), "encoder_hidden_states": [noise(3, 5, 12)],
        "timestep": moment(step),
    }


def _joy(edit: bool = False) -> Any:
    from sglang.multimodal_gen.configs.models.dits.joy_image import JoyImageDiTConfig
    from sglang.multimodal_gen.runtime.models.dits import joy_image

    cls = joy_image.JoyImageEditTransformer3DModel if edit else joy_image.JoyTransformer3DModel
    return cls(
        _config(
            JoyImageDiTConfig, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
            mm_double_blocks_depth=4, freq_dim=16, text_states_dim=12, mlp_width_ratio=2.0,
            rope_dim_list=[4, 6, 6],
        ),
        {},
    )


def _joy_inputs(size: int, step: int) -> dict[str, Any]:
    tokens = GRIDS[size][0] * GRIDS[size][1]
    return {
        "hidden_states": drift(1, step, 1, tokens, 4, 1, 2, 2), "encoder_hidden_states": noise(3, 1, 5, 12),
        "timestep": moment(step), "vis_freqs_cis": torch.cat(_rope(tokens, 16), -1),
    }


CASES: dict[str, Case] = {
    "Flux3ImageDiT": Case(build=_flux3_image, inputs=_flux3_image_inputs, dtype=torch.bfloat16),
    "QwenImage21Transformer2DModel": Case(
        build=_qwen21, inputs=_qwen21_inputs, fresh=lambda model: {"prefix_caches": [[{} for _ in range(4)]]}
    ),
    "MingImageTransformer2DModel": Case(build=_ming, inputs=_ming_inputs),
    "LongCatImageTransformer2DModel": Case(build=_longcat, inputs=_longcat_inputs),
    "AnimaTransformer3DModel": Case(build=_anima, inputs=_anima_inputs),
    "ErnieImageTransformer2DModel": Case(
        build=_ernie, inputs=lambda size, step: _plane_inputs(size, step, channels=8, text=12)
    ),
    "Krea2Transformer2DModel": Case(build=_krea2, inputs=_krea2_inputs),
    "Ideogram4Transformer2DModel": Case(build=_ideogram, inputs=_ideogram_inputs),
    "SanaTransformer2DModel": Case(
        build=_sana, inputs=lambda size, step: _plane_inputs(size, step, channels=4, text=12)
    ),
    "MOSSImageTransformer": Case(build=_moss, inputs=_moss_inputs),
    "LLaDAImageTransformer2DModel": Case(build=_llada, inputs=_llada_inputs),
    "JoyTransformer3DModel": Case(build=_joy, inputs=_joy_inputs, dtype=torch.bfloat16),
    "JoyImageEditTransformer3DModel": Case(
        build=lambda: _joy(edit=True), inputs=_joy_inputs, dtype=torch.bfloat16
    ),
}
