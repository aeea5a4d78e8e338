"""Metrics against values known in advance."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_cachedit_plugin.evaluation import quality


def scored(metric, reference, picture):
    return quality.summary(quality.by_frame(metric, reference, picture), metric)["mean"]


def compare(reference, picture, metrics=quality.METRICS):
    return {name: quality.summary(quality.by_frame(name, reference, picture), name) for name in metrics}


@pytest.fixture
def picture():
    return np.random.default_rng(1).integers(60, 190, size=(48, 64, 3), dtype=np.uint8)


def test_psnr_of_a_constant_offset(picture):
    # An error of 16 everywhere: 20 log10(255 / 16).
    assert quality.psnr(picture, picture + 16) == pytest.approx(24.0476, abs=1e-3)


def test_psnr_does_not_wrap_round_in_uint8(picture):
    assert quality.psnr(picture, picture - 16) == pytest.approx(quality.psnr(picture, picture + 16))


def test_float_and_uint8_pictures_agree(picture):
    other = picture + 9
    in_float = compare(picture / 255.0, other / 255.0)
    in_bytes = compare(picture, other)
    for metric in quality.METRICS:
        assert in_float[metric]["mean"] == pytest.approx(in_bytes[metric]["mean"], abs=1e-6)


def test_equal_pictures(picture):
    assert quality.psnr(picture, picture) == quality.IDENTICAL_PSNR
    assert quality.ssim(picture, picture) == pytest.approx(1.0)
    assert scored("flip", picture, picture) == 0.0


def test_ssim_of_constant_pictures():
    # Without structure only the luminance term is left: (2ab + c1) / (a² + b² + c1), c1 = 0.01².
    dark, light = np.full((32, 32, 3), 0.2), np.full((32, 32, 3), 0.6)
    assert quality.ssim(dark, light) == pytest.approx(0.6001, abs=1e-4)


def test_flip_of_black_and_white():
    # LDR-FLIP of black against white is 0.967 (the colour term alone, no edges).
    black, white = np.zeros((32, 32, 3)), np.ones((32, 32, 3))
    assert scored("flip", black, white) == pytest.approx(0.9673, abs=1e-3)


def test_worse_pictures_score_worse(picture):
    noise = np.random.default_rng(2).normal(size=picture.shape)
    near, far = (np.clip(picture / 255.0 + noise * size, 0, 1) for size in (0.01, 0.1))
    scores = [compare(picture / 255.0, other) for other in (near, far)]
    assert scores[0]["psnr"]["mean"] > scores[1]["psnr"]["mean"]
    assert scores[0]["ssim"]["mean"] > scores[1]["ssim"]["mean"]
    assert scores[0]["flip"]["mean"] < scores[1]["flip"]["mean"]


def test_a_video_is_scored_by_frame(picture):
    video = np.stack([picture, picture + 4, picture + 32])
    scores = compare(np.stack([picture] * 3), video, ["psnr", "flip"])
    assert scores["psnr"]["each"] == pytest.approx([100.0, 36.0896, 18.0271], abs=1e-3)
    assert scores["psnr"]["min"] == pytest.approx(18.0271, abs=1e-3)
    assert scores["psnr"]["mean"] == pytest.approx((100.0 + 36.0896 + 18.0271) / 3, abs=1e-3)
    assert scores["flip"]["max"] == scores["flip"]["each"][2] > scores["flip"]["each"][1] > 0


def test_shapes_must_agree(picture):
    with pytest.raises(ValueError, match="different shapes"):
        quality.psnr(picture, picture[:-1])


def test_latents(picture):
    latents = np.linspace(-2.0, 2.0, 1000).reshape(10, 100)
    # The peak is the range, 4; an error of 0.04 is a hundredth of it.
    assert quality.latent_psnr(latents, latents + 0.04) == pytest.approx(40.0)
    assert quality.latent_psnr(latents, latents) == quality.IDENTICAL_PSNR


def test_files_of_pictures_and_videos_are_read(picture, tmp_path):
    from PIL import Image

    Image.fromarray(picture).save(tmp_path / "picture.png")
    np.save(tmp_path / "video.npy", np.stack([picture, picture]))
    assert np.array_equal(quality.load(tmp_path / "picture.png"), picture)
    assert quality.load(tmp_path / "video.npy").shape == (2, 48, 64, 3)
    import imageio

    imageio.mimsave(tmp_path / "video.mp4", [np.full((64, 64, 3), 128, np.uint8)] * 3, fps=8, macro_block_size=16)
    video = quality.load(tmp_path / "video.mp4")
    assert video.shape == (3, 64, 64, 3)
    assert quality.psnr(np.full((3, 64, 64, 3), 128, np.uint8), video) > 35
