"""The results of a run in the form that the report takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation import quality
from . import selection
from .candidates import Candidate
from .evaluate import SHEET, Evaluator, Prompt
from .job import Plan, Result

DEFAULT = "dbcache-0.24"
"""The candidate with the server's default settings."""


def results(
    plan: Plan, found: Sequence[Result], evaluator: Evaluator, provenance: Mapping[str, Any],
    model: Mapping[str, Any], folder: Path,
) -> dict[str, Any]:
    """Everything that ``report.write_report`` takes; pictures of the sheet are written into ``folder``.

    Of a video the sheet has the middle frame.
    """
    return {
        "model": dict(model), "provenance": dict(provenance),
        "grids": [_grid(result) for result in found],
        "sheet": _sheet(plan, found[0], evaluator, folder) if found else [],
    }


def _grid(result: Result) -> dict[str, Any]:
    words = [selection.describe(result.points, result.chosen)] if result.chosen is not None else []
    return {
        "steps": result.grid.steps, "size": list(result.grid.size), "step_seconds": result.step_seconds,
        "points": result.points, "chosen": result.chosen["name"] if result.chosen is not None else None,
        "selection": " ".join([*words, *(f"{remark}." for remark in result.remarks)]), "methods": result.methods,
    }


def _sheet(plan: Plan, result: Result, evaluator: Evaluator, folder: Path) -> list[dict[str, Any]]:
    if result.chosen is None:
        return []
    steps = round(result.chosen["computed"])
    columns: dict[str, Candidate | None] = {
        "chosen": _as_request("chosen", result.chosen["settings"]),
        "default": _as_request(DEFAULT, {}),
        "fewer_steps": Candidate("fewer", "fewer_steps", "", {"enable_cache_dit": False}, steps=steps),
    }
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, prompt in enumerate(plan.heldout[:SHEET]):
        images = {"uncached": _save(folder, f"{number}-uncached", evaluator.reference(prompt, result.grid)["picture"])}
        for column, candidate in columns.items():
            images[column] = _save(folder, f"{number}-{column}", _picture(evaluator, prompt, result, candidate))
        rows.append({"prompt": prompt.text, "seed": prompt.seed, "images": images})
    return rows


def _as_request(name: str, settings: Mapping[str, Any]) -> Candidate:
    return Candidate(name, "baseline", name, {"enable_cache_dit": True, "cache_dit_params": dict(settings)})


def _picture(evaluator: Evaluator, prompt: Prompt, result: Result, candidate: Candidate) -> np.ndarray:
    return evaluator.measure(
        prompt, result.grid, candidate.request, pictures=True, keep=True, steps=candidate.steps
    )["picture"]


def _save(folder: Path, name: str, picture: np.ndarray) -> str:
    from PIL import Image

    path = f"pictures/{name}.png"
    Image.fromarray(quality.still(picture)).save(folder / path)
    return path
