"""The shipped demo model: complete, small, knows its alphabet, and computes."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import torch

from sglang_cachedit_plugin import demo

FOLDER = demo.model_dir()
LIMIT = 20_000_000
PARTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "tokenizer": "tokenizer.json",
    "tokenizer_2": "tokenizer.json",
    "scheduler": "scheduler_config.json",
}


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import FluxPipeline

    return FluxPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32, local_files_only=True)


def prompts(name: str) -> list[str]:
    return (Path(demo.__file__).parent / "prompts" / name).read_text(encoding="utf-8").splitlines()


def test_folder_is_complete_and_named_for_the_host():
    assert FOLDER.name == "FLUX.1-dev"
    assert (FOLDER / "model_index.json").is_file()
    assert (FOLDER / "README.md").is_file()
    assert (FOLDER.parent / "OFL.txt").is_file()
    for part, file in PARTS.items():
        assert (FOLDER / part / file).is_file(), part


def test_model_stays_within_its_size():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= LIMIT


def test_prompt_lists_do_not_overlap():
    names, tune, heldout = prompts("names.txt"), prompts("tune.txt"), prompts("heldout.txt")
    assert (len(names), len(tune), len(heldout)) == (100, 12, 48)
    assert not set(tune) & set(heldout)


@pytest.mark.parametrize("which", ["tokenizer", "tokenizer_2"])
def test_no_common_character_or_prompt_is_unknown(pipeline, which):
    tokenizer = getattr(pipeline, which)
    lines = [*string.digits, *string.ascii_letters, *prompts("names.txt"), *prompts("heldout.txt"), "2 dogs, 17 cats!"]
    unknown = tokenizer.unk_token_id
    for line in lines:
        inner = tokenizer(line, add_special_tokens=False).input_ids
        assert inner, line
        assert unknown not in inner, line


def test_text_encoders_tell_names_apart(pipeline):
    pooled = pipeline.encode_prompt("red apple", "red apple")[1], pipeline.encode_prompt("pizza", "pizza")[1]
    assert (pooled[0] - pooled[1]).abs().max() > 0.1


def test_one_step_is_finite(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        "red apple", width=128, height=128, num_inference_steps=1, output_type="np",
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    assert picture.shape == (128, 128, 3)
    assert torch.isfinite(torch.from_numpy(picture)).all()
    assert picture.std() > 0.01


@pytest.fixture(scope="module")
def video_pipeline():
    from diffusers import WanPipeline

    made = WanPipeline.from_pretrained(demo.video_model_dir(), torch_dtype=torch.float32, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


def test_the_video_model_is_complete_and_small():
    folder = demo.video_model_dir()
    assert folder.name == "Wan2.2-T2V-A14B-Diffusers"
    assert (folder / "README.md").is_file()
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= LIMIT / 2


def test_video_prompts_do_not_overlap_and_are_known(video_pipeline):
    tune, heldout = prompts("video-tune.txt"), prompts("video-heldout.txt")
    assert (len(tune), len(heldout)) == (12, 40)
    assert not {line.rsplit(" ", 2)[0] for line in tune} & {line.rsplit(" ", 2)[0] for line in heldout}
    for line in [*tune, *heldout]:
        assert video_pipeline.tokenizer.unk_token_id not in video_pipeline.tokenizer(line).input_ids, line


@pytest.mark.parametrize(
    ("direction", "axis", "sign"), [("right", 1, 1), ("left", 1, -1), ("down", 0, 1), ("up", 0, -1)]
)
def test_what_the_prompt_names_moves_where_it_says(video_pipeline, direction, axis, sign):
    frames = video_pipeline(
        f"blue heart moving {direction}", negative_prompt="", height=64, width=64, num_frames=9, guidance_scale=2.0,
        num_inference_steps=10, output_type="pt", generator=torch.Generator().manual_seed(3),
    ).frames[0]
    ink = 1.0 - frames[:, 0]  # (9, 64, 64): a blue heart on white has no red
    places = torch.arange(64.0)
    along = ink.sum(dim=2 - axis)
    centres = (along * places).sum(dim=1) / along.sum(dim=1)
    assert sign * (centres[-1] - centres[0]) > 15
    assert (frames[:, 2] - frames[:, 0])[ink > 0.5].mean() > 0.3


def test_packing_inverts():
    from tools.demo_models.model import pack, unpack

    latents = torch.randn(2, 16, 16, 16)
    assert torch.equal(unpack(pack(latents)), latents)


def test_corner_placement_moves_by_whole_image_tokens():
    from tools.demo_models.placements import corners, place

    picture = -torch.ones(1, 3, 128, 128)
    inked = place(picture, corners()[:1])[0, 0] < 0
    assert inked[:96, :96].all()
    assert not inked[97:].any()
    assert not inked[:, 97:].any()


@pytest.mark.parametrize("folder", [demo.model_dir(), demo.video_model_dir()], ids=lambda folder: folder.name)
def test_no_part_tells_where_it_was_made(folder):
    for config in folder.glob("*/config.json"):
        assert not json.loads(config.read_text()).get("_name_or_path"), config
