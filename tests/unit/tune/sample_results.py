"""Made-up results of a tuning run, shaped like real ones, with hostile texts in every field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HOSTILE = "<script>alert('x')</script> & \"quotes\""
STEPS = 28


def _score(mean: float, least: float) -> dict[str, Any]:
    return {"mean": mean, "min": least, "each": [mean, least]}


def _point(name: str, kind: str, label: str, computed: float, mean: float, least: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "kind": kind, "label": label, "settings": {}, "computed": computed,
        "speedup": STEPS / computed, "psnr": _score(mean, least), "ssim": _score(0.99, 0.97),
        "latent_psnr": _score(mean - 1, least - 1), "mask": None, "step_errors": None, **more,
    }


def _mask(computed: int) -> list[int]:
    return [1 if step < 4 or step * computed // STEPS != (step - 1) * computed // STEPS else 0 for step in range(STEPS)]


def _errors(mask: list[int], scale: float) -> list[float]:
    error, errors = 0.0, []
    for step in mask:
        error = error * 0.97 + (0.0 if step else scale)
        errors.append(error)
    return errors


def points() -> list[dict[str, Any]]:
    """Every kind, with masks and errors where the real ones have them."""
    found = []
    for computed, mean, least in ((7, 30.1, 24.6), (10, 35.4, 28.8), (14, 43.2, 39.3), (18, 47.5, 42.0)):
        mask = _mask(computed)
        found.append(_point(f"tuned-{computed}", "tuned", f"tuned {computed}", computed, mean, least, mask=mask,
                            step_errors=_errors(mask, 0.004)))
    for computed, mean, least in ((7, 22.8, 16.0), (10, 27.6, 19.1), (14, 32.0, 22.8), (20, 39.6, 26.5)):
        found.append(_point(f"fewer-{computed}", "fewer_steps", f"{computed} steps", computed, mean, least))
    for computed, mean, least in ((7, 23.4, 18.0), (10, 28.8, 22.1), (14, 34.6, 28.0), (18, 38.9, 31.9)):
        mask = _mask(computed)[::1]
        found.append(_point(f"growing-{computed}", "growing_window", f"growing window {computed}", computed, mean,
                            least, mask=mask, step_errors=_errors(mask, 0.011)))
    for threshold, computed, mean, least in ((0.08, 19.5, 30.2, 24.0), (0.12, 17.9, 28.6, 22.5), (0.24, 13.7, 25, 20)):
        found.append(_point(f"dbcache-{threshold}", "baseline", f"DBCache R {threshold}", computed, mean, least,
                            family="DBCache"))
    for name, computed, mean, least in (
        ("SCM slow", 20, 33.0, 29.9), ("SCM medium", 17.6, 30.2, 28.4), ("SCM fast", 13.7, 27.3, 25.9),
        ("TaylorSeer 1", 14.1, 29.5, 23.8), ("DMD", 14.1, 27.9, 21.0),
    ):
        found.append(_point(name, "baseline", name, computed, mean, least))
    found.append(_point("teacache", "host", "TeaCache 0.3", 12.0, 26.2, 19.9))
    found.append(_point("spectrum", "host", f"Spectrum {HOSTILE}", 11.0, 28.4, 20.5))
    found.append(_point("all", "fewer_steps", "28 steps", STEPS, 100.0, 100.0))
    return found


def pictures(folder: Path, prompts: int = 2) -> list[dict[str, Any]]:
    """Rows of the sheet, drawn into ``folder``; the second has no picture of the defaults."""
    generator, rows = np.random.default_rng(3), []
    y, x = np.mgrid[0:96, 0:96]
    for index in range(prompts):
        plain = np.stack([120 + 80 * np.sin((x + 30 * index) / 9), 2 * y, 255 - x - y], axis=2).clip(0, 255)
        images = {}
        for column, noise in {"uncached": 0.0, "chosen": 1.5, "default": 9.0, "fewer_steps": 6.0}.items():
            picture = plain + generator.normal(size=plain.shape) * noise
            path = folder / f"{index}-{column}.png"
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path)
            images[column] = path.name
        rows.append({"prompt": f"red apple {HOSTILE if index else ''}", "seed": index + 1, "images": images,
                     "seconds": {"uncached": 1.2, "chosen": 0.61}})
    rows[-1]["images"]["default"] = "not-there.png"
    return rows


def results(folder: Path) -> dict[str, Any]:
    """All of it."""
    return {
        "model": {"name": "FLUX.1-dev", "path": "models/FLUX.1-dev", "parameters": 7_000_000},
        "provenance": {
            "command": f"sglang-cachedit tune --prompts {HOSTILE}", "date": "2026-11-21", "machine": "two CPU cores",
            "host": "SGLang 0.5.23", "cache_dit": "1.5.1", "seed": 1, "prompts": {"tune": 12, "heldout": 48},
        },
        "grids": [{
            "steps": STEPS, "size": [128, 128], "step_seconds": {"computed": 0.0425, "cached": 0.0009},
            "points": points(), "chosen": "tuned-14",
            "selection": f"The tuned schedule beats every other at 14 computed steps. {HOSTILE}",
        }],
        "sheet": pictures(folder),
    }
