"""How near one picture or video is to another: PSNR, SSIM and FLIP, computed in float.

Pictures are arrays (height, width, 3), videos (frames, height, width, 3); uint8 from 0 to 255, or float from 0 to 1.
Every metric takes the reference first. A video's value is the mean over its frames; ``by_frame`` gives each frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

IDENTICAL_PSNR = 100.0
"""dB of equal pictures, and the most that ``psnr`` returns, so that means stay finite. 8-bit pictures of a
megapixel that differ in one sample by one step have 113 dB, so nothing visible is cut off."""

VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mov", ".avi", ".mkv", ".gif"})


def load(path: Path | str) -> np.ndarray:
    """A picture (height, width, 3) or a video (frames, height, width, 3) from a file, uint8."""
    path = Path(path)
    if path.suffix.lower() == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        import imageio

        with imageio.get_reader(str(path)) as reader:
            return np.stack([np.asarray(frame)[..., :3] for frame in reader])
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def still(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) itself, of a video (T, H, W, 3) the middle frame."""
    return picture if picture.ndim == 3 else picture[len(picture) // 2]


def _frames(picture: np.ndarray) -> np.ndarray:
    return picture[None] if picture.ndim == 3 else picture


def _unit(frame: np.ndarray) -> np.ndarray:
    """One frame as float64 from 0 to 1."""
    return frame.astype(np.float64) / 255.0 if frame.dtype == np.uint8 else frame.astype(np.float64)


def _frame_psnr(reference: np.ndarray, picture: np.ndarray) -> float:
    error = float(np.mean((reference - picture) ** 2))
    return IDENTICAL_PSNR if error == 0.0 else min(IDENTICAL_PSNR, -10.0 * np.log10(error))


def _frame_ssim(reference: np.ndarray, picture: np.ndarray) -> float:
    from skimage.metrics import structural_similarity

    return float(structural_similarity(reference, picture, channel_axis=2, data_range=1.0))


def _frame_flip(reference: np.ndarray, picture: np.ndarray) -> float:
    from flip_evaluator import evaluate

    pair = (np.ascontiguousarray(frame, dtype=np.float32) for frame in (reference, picture))
    return float(evaluate(*pair, "LDR", applyMagma=False)[1])


_METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "psnr": _frame_psnr, "ssim": _frame_ssim, "flip": _frame_flip,
}
METRICS = tuple(_METRICS)
LOWER_IS_BETTER = frozenset({"flip"})


def available() -> tuple[str, ...]:
    """Metrics whose libraries are installed: SSIM needs scikit-image, FLIP needs flip-evaluator."""
    from importlib.util import find_spec

    needs = {"ssim": "skimage", "flip": "flip_evaluator"}
    return tuple(name for name in METRICS if name not in needs or find_spec(needs[name]))


def by_frame(metric: str, reference: np.ndarray, picture: np.ndarray) -> list[float]:
    """The metric of each frame; one value for a picture.

    Raises:
        ValueError: the two differ in shape.
    """
    if reference.shape != picture.shape:
        raise ValueError(f"pictures of different shapes: {reference.shape} and {picture.shape}")
    pairs = zip(_frames(reference), _frames(picture), strict=True)
    return [_METRICS[metric](_unit(a), _unit(b)) for a, b in pairs]


def psnr(reference: np.ndarray, picture: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, at most 100; the mean over frames."""
    return float(np.mean(by_frame("psnr", reference, picture)))


def ssim(reference: np.ndarray, picture: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004, scikit-image), 1 for equal pictures; the mean over frames."""
    return float(np.mean(by_frame("ssim", reference, picture)))


def summary(values: Sequence[float], metric: str = "psnr") -> dict[str, Any]:
    """``mean``, the 10th percentile as ``p10`` and the worst as ``min`` (``p90`` and ``max`` where lower is better),
    and ``each``."""
    low, worst, least = ("p90", "max", max) if metric in LOWER_IS_BETTER else ("p10", "min", min)
    return {
        "mean": float(np.mean(values)), low: float(np.percentile(values, float(low[1:]))), worst: float(least(values)),
        "each": [float(value) for value in values],
    }


def latent_psnr(reference: np.ndarray, latents: np.ndarray) -> float:
    """PSNR in dB of two latents of equal shape, the peak being the range of the reference; at most 100."""
    reference, latents = (np.asarray(values, dtype=np.float64) for values in (reference, latents))
    error = float(np.mean((reference - latents) ** 2))
    if error == 0.0:
        return IDENTICAL_PSNR
    return min(IDENTICAL_PSNR, float(10.0 * np.log10(np.ptp(reference) ** 2 / error)))
