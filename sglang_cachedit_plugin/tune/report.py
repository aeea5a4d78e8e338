"""The report of a tuning run: one page that opens from disk, its charts and sheet as PNG, the figures as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation import plots, quality
from ..evaluation.quality import IDENTICAL_PSNR
from . import charts, selection, sheet, write
from .candidates import Candidate
from .evaluate import SHEET, Evaluator
from .job import Plan, Result

PAGE, CHART, PICTURES, FIGURES = "report.html", "report.png", "contact-sheet.png", "results.json"
DEFAULT = "dbcache-0.24"
"""The candidate with the server's default settings."""


def write_report(results: Mapping[str, Any], folder: Path | str) -> Path:
    """Write ``report.html``, ``report.png``, ``contact-sheet.png`` and ``results.json``; returns the page's path.

    Args:
        results: ``{"model", "provenance", "grids", "sheet"}``. Of a grid: ``steps``, ``size`` (width, height; frames),
            ``step_seconds``, ``points``, ``chosen`` (a point's name), ``selection``. Of a point: ``name``, ``kind``
            (tuned, baseline, fewer_steps, growing_window, host), ``label``, ``computed`` steps, ``psnr`` in dB with
            ``mean`` and ``min`` over the held-out prompts; optional ``family`` (points that a line joins),
            ``speedup``, ``ssim``, ``latent_psnr``, ``mask`` (a list, or one for each branch or transformer),
            ``step_errors`` (relative error of the latents after each step). Pictures of ``sheet`` are paths, relative
            ones from ``folder``.
        folder: made where it is missing.

    Raises:
        ValueError: a point of an unknown kind, or two points of one name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = _finite(results)
    for grid in figures["grids"]:
        _check(grid["points"])
    rows = sheet.read(figures.get("sheet") or (), folder)
    factor = sheet.amplification(rows)
    (folder / FIGURES).write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    plots.png([panel for grid in figures["grids"] for panel in _panels(grid, figures)], folder / CHART)
    if rows:
        sheet.write_png(rows, factor, folder / PICTURES)
    page = _page(figures, sheet.page_rows(rows, factor), factor)
    (folder / PAGE).write_text(page, encoding="utf-8")
    return folder / PAGE


def _finite(value: Any) -> Any:
    """The same without NaN and infinity, which JSON has not: infinite dB are those of equal pictures, NaN is null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else math.copysign(IDENTICAL_PSNR, value)
    if isinstance(value, Path):
        return str(value)
    return value.item() if hasattr(value, "item") else value


def _check(points: Sequence[Mapping[str, Any]]) -> None:
    names = [point["name"] for point in points]
    for point in points:
        if point["kind"] not in charts.LOOKS:
            raise ValueError(f"{point['name']}: kind {point['kind']!r}, expected one of {', '.join(charts.LOOKS)}")
        if names.count(point["name"]) > 1:
            raise ValueError(f"two points are called {point['name']!r}")


def _prompts(figures: Mapping[str, Any]) -> int | None:
    return (figures.get("provenance") or {}).get("prompts", {}).get("heldout")


def _with_masks(grid: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Tuned points by computed steps, then the others at the chosen number of computed steps."""
    chosen = _chosen(grid)
    tuned = sorted((p for p in grid["points"] if p["kind"] == "tuned"), key=lambda point: point["computed"])
    rest = [
        point for point in grid["points"]
        if point["kind"] != "tuned" and chosen is not None and abs(point["computed"] - chosen["computed"]) < 0.5
    ]
    return [*tuned, *rest]


def _panels(grid: Mapping[str, Any], figures: Mapping[str, Any]) -> list[plots.Panel]:
    points, chosen = grid["points"], grid.get("chosen")
    more = charts.error_panel(points, chosen), charts.strips_panel(_with_masks(grid), chosen)
    return [*charts.quality_panels(points, chosen, _prompts(figures)), *(panel for panel in more if panel is not None)]


def _chosen(grid: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((point for point in grid["points"] if point["name"] == grid.get("chosen")), None)


def headline(grid: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The chosen point in figures: (value, what it is)."""
    chosen = _chosen(grid)
    if chosen is None:
        return []
    facts = [(f"{chosen['computed']:g} of {grid['steps']}", "steps computed")]
    if chosen.get("speedup"):
        facts.append((f"{chosen['speedup']:.2f}×", "faster denoising"))
    psnr = chosen["psnr"]
    return facts + [
        (f"{psnr[which]:.1f} dB", f"PSNR, {name}") for which, name in charts.STATISTICS.items() if which in psnr
    ]


def _grid(grid: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """One grid as the template takes it."""
    name, points = grid.get("chosen"), grid["points"]
    table = sorted(points, key=lambda point: (-point["computed"], -point["psnr"]["mean"]))
    return {
        "title": f"{grid['steps']} steps, {'×'.join(str(side) for side in grid['size'])}",
        "selection": grid.get("selection"),
        "headline": headline(grid),
        "panels": [plots.svg(panel) for panel in _panels(grid, figures)],
        "rows": [{**point, "is_chosen": point["name"] == name, "kind_name": charts.LOOKS[point["kind"]].name,
                  "colour": charts.LOOKS[point["kind"]].colour} for point in table],
        "step_seconds": grid.get("step_seconds") or {},
        "identical": IDENTICAL_PSNR,
    }


def _page(figures: Mapping[str, Any], rows: list[dict[str, Any]], factor: int) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawn"] = Markup
    model = figures.get("model") or {}
    return environment.get_template("report.html.jinja").render(
        name=model.get("name") or Path(str(model.get("path") or "model")).name,
        model=model,
        provenance=figures.get("provenance") or {},
        grids=[_grid(grid, figures) for grid in figures["grids"]],
        sheet=rows,
        factor=factor,
        colours=plots.COLOURS,
    )


def results(
    plan: Plan, found: Sequence[Result], evaluator: Evaluator, provenance: Mapping[str, Any],
    model: Mapping[str, Any], folder: Path,
) -> dict[str, Any]:
    """Everything that ``write_report`` takes; pictures of the sheet are written into ``folder``.

    Of a video the sheet has the middle frame.
    """
    return {
        "model": dict(model), "provenance": dict(provenance),
        "grids": [_figures(result) for result in found],
        "sheet": _sheet(plan, found[0], evaluator, folder) if found else [],
    }


def _figures(result: Result) -> dict[str, Any]:
    words = [selection.describe(result.points, result.chosen)] if result.chosen is not None else []
    words += [f"{write.kept(result.promise)}."] if result.promise else []
    return {
        "steps": result.grid.steps, "size": list(result.grid.size), "step_seconds": result.step_seconds,
        "points": result.points, "chosen": result.chosen["name"] if result.chosen is not None else None,
        "promise": result.promise, "selection": " ".join([*words, *(f"{remark}." for remark in result.remarks)]),
        "methods": result.methods,
    }


def _sheet(plan: Plan, result: Result, evaluator: Evaluator, folder: Path) -> list[dict[str, Any]]:
    if result.chosen is None:
        return []
    steps = round(result.chosen["computed"])
    columns = {
        "chosen": _as_request("chosen", result.chosen["settings"]),
        "default": _as_request(DEFAULT, {}),
        "fewer_steps": Candidate("fewer", "fewer_steps", "", {"enable_cache_dit": False}, steps=steps),
    }
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    prompts = plan.heldout[:SHEET]
    found = {"uncached": evaluator.references(prompts, result.grid)} | {
        column: evaluator.measure_all(
            prompts, result.grid, candidate.request, pictures=True, keep=SHEET, steps=candidate.steps
        )
        for column, candidate in columns.items()
    }
    return [
        {"prompt": prompt.text, "seed": prompt.seed, "images": {
            column: _save(folder, f"{number}-{column}", each[number]["picture"]) for column, each in found.items()
        }, "seconds": {column: each[number]["denoising_s"] for column, each in found.items()}}
        for number, prompt in enumerate(prompts)
    ]


def _as_request(name: str, settings: Mapping[str, Any]) -> Candidate:
    return Candidate(name, "baseline", name, {"enable_cache_dit": True, "cache_dit_params": dict(settings)})


def _save(folder: Path, name: str, picture: np.ndarray) -> str:
    from PIL import Image

    path = f"pictures/{name}.png"
    Image.fromarray(quality.still(picture)).save(folder / path)
    return path
