"""Tiny random models in diffusers format, wide enough that a wrong step or branch changes the picture.

Default initialisation hardly moves the latents; ``widen`` scales every matrix so that residuals matter.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

WORDS = [
    "a", "an", "the", "red", "green", "blue", "apple", "cat", "dog", "moon", "house", "tree", "of", "on", "in", "with",
    "photo", "painting", "small", "large",
]


def widen(model: nn.Module, seed: int, scale: float = 1.2) -> nn.Module:
    """Fill every matrix with ``randn * scale / sqrt(fan_in)``, zero the biases, calm the time embedding."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            fan_in = parameter[0].numel()
            values = torch.randn(parameter.shape, generator=generator) * scale / math.sqrt(fan_in)
            parameter.data.copy_(values * (0.1 if "time" in name else 1.0))
        elif name.endswith("bias"):
            parameter.data.zero_()
    return model


def t5_tokenizer(length: int = 64):
    """A Unigram tokenizer that knows ``WORDS`` letter by letter."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    letters = [chr(c) for c in range(97, 123)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -4.0) for word in WORDS if len(word) > 1] + [(letter, -6.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return T5TokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", extra_ids=0,
        model_max_length=length,
    )


def clip_tokenizer(folder: Path):
    """A byte-pair tokenizer without merges."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(97, 123)]
    vocabulary = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    import json

    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77), len(vocabulary)


def text_encoders(folder: Path, dim: int):
    """CLIP and T5 with random weights; hidden size ``dim``."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tokenizer, size = clip_tokenizer(folder / "clip-vocabulary")
    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=size, hidden_size=dim, intermediate_size=dim, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=77, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
    ))
    tokenizer_2 = t5_tokenizer(512)
    t5 = T5EncoderModel(T5Config(
        vocab_size=len(tokenizer_2), d_model=dim, d_kv=8, d_ff=dim, num_layers=1, num_heads=4,
    ))
    return tokenizer, widen(clip, 3), tokenizer_2, widen(t5, 4)


def flux(folder: Path, double: int = 4, single: int = 8) -> Path:
    """FLUX.1 with that many double and single blocks."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    path = folder / "FLUX.1-dev"
    tokenizer, clip, tokenizer_2, t5 = text_encoders(folder, 32)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=double, num_single_layers=single, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    FluxPipeline(
        scheduler=scheduler, vae=vae, text_encoder=clip, tokenizer=tokenizer, text_encoder_2=t5,
        tokenizer_2=tokenizer_2, transformer=widen(transformer, 1),
    ).save_pretrained(path)
    return path


def qwen_parts(layers: int) -> dict:
    """Modules of Qwen-Image with a tiny Qwen2.5-VL."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    image, start, end = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"])
    config = Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=4096,
            rope_scaling={"type": "default", "mrope_section": [1, 1, 2], "rope_type": "default"},
            rope_theta=1000000.0,
        ),
        vision_config=dict(
            depth=2, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16,
        ),
        hidden_size=16, vocab_size=len(tokenizer),
        image_token_id=image, vision_start_token_id=start, vision_end_token_id=end,
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, num_layers=layers, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=16, axes_dims_rope=(8, 12, 12),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True), "vae": vae,
        "text_encoder": widen(Qwen2_5_VLForConditionalGeneration(config), 5), "tokenizer": tokenizer,
        "transformer": widen(transformer, 6),
    }


def qwen_image(folder: Path) -> Path:
    """Qwen-Image with 6 blocks."""
    from diffusers import QwenImagePipeline

    QwenImagePipeline(**qwen_parts(6)).save_pretrained(path := folder / "Qwen-Image")
    return path


def qwen_edit(folder: Path) -> Path:
    """Qwen-Image-Edit with 2 blocks: SGLang scales the picture that is edited to a million pixels."""
    from diffusers import QwenImageEditPipeline
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    parts = qwen_parts(2)
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=pixels), parts["tokenizer"], Qwen2VLVideoProcessor(size=pixels)
    )
    QwenImageEditPipeline(**parts, processor=processor).save_pretrained(path := folder / "Qwen-Image-Edit")
    return path


def qwen_tokenizer():
    """Bytes as tokens, with the chat marks that Qwen-Image's prompt template uses."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2TokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(mark, special=True) for mark in (
            "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>",
            "<|vision_end|>",
        )]
    )
    return Qwen2TokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def wan(folder: Path, *, experts: bool) -> Path:
    """Wan 2.1 with one transformer, or Wan 2.2 with two experts."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    path = folder / ("Wan2.2-T2V-A14B-Diffusers" if experts else "Wan2.1-T2V-1.3B-Diffusers")

    def transformer(seed: int):
        return widen(WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=24, in_channels=16,
            out_channels=16, text_dim=32, freq_dim=32, ffn_dim=128, num_layers=6, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
        ), seed)

    tokenizer = t5_tokenizer(512)
    encoder = UMT5EncoderModel(UMT5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4,
    ))
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    WanPipeline(
        tokenizer=tokenizer, text_encoder=widen(encoder, 7), vae=vae, scheduler=scheduler,
        transformer=transformer(8), transformer_2=transformer(9) if experts else None,
        boundary_ratio=0.875 if experts else None,
    ).save_pretrained(path)
    return path


BUILDERS = {
    "flux": flux,
    "qwen": qwen_image,
    "qwen_edit": qwen_edit,
    "wan21": lambda folder: wan(folder, experts=False),
    "wan22": lambda folder: wan(folder, experts=True),
}


def main() -> None:
    """Build the named models into a folder: ``python -m tests.tiny.build FOLDER flux qwen ...``."""
    import sys

    for name in sys.argv[2:]:
        print(BUILDERS[name](Path(sys.argv[1])))


if __name__ == "__main__":
    main()
