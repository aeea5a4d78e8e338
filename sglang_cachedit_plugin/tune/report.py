"""The report of a tuning run: one page that opens from disk, its charts and sheet as PNG, the figures as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation import plots
from ..evaluation.quality import IDENTICAL_PSNR
from . import charts, sheet

PAGE, CHART, SHEET, FIGURES = "report.html", "report.png", "contact-sheet.png", "results.json"


def write_report(results: Mapping[str, Any], folder: Path | str) -> Path:
    """Write ``report.html``, ``report.png``, ``contact-sheet.png`` and ``results.json``; returns the page's path.

    Args:
        results: ``{"model", "provenance", "grids", "sheet"}``. Of a grid: ``steps``, ``size`` (width, height; frames),
            ``step_seconds``, ``points``, ``chosen`` (a point's name), ``verdict``. Of a point: ``name``, ``kind``
            (tuned, baseline, fewer_steps, growing_window, peer), ``label``, ``computed`` steps, ``psnr`` in dB with
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
    plots.png([line for grid in figures["grids"] for line in _chart_rows(grid, figures)], folder / CHART)
    if rows:
        sheet.write_png(rows, factor, folder / SHEET)
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


def _chart_rows(grid: Mapping[str, Any], figures: Mapping[str, Any]) -> list[list[plots.Drawing]]:
    rows = [
        charts.quality_panels(grid["points"], grid.get("chosen"), _prompts(figures)),
        [charts.error_chart(grid["points"], grid.get("chosen"))],
        [charts.mask_strips(_with_masks(grid), grid.get("chosen"))],
    ]
    return [[part for part in row if part is not None] for row in rows if row != [None]]


def _chosen(grid: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((point for point in grid["points"] if point["name"] == grid.get("chosen")), None)


def headline(grid: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The chosen point in figures: (value, what it is). Rivals are all points that are not tuned."""
    chosen = _chosen(grid)
    if chosen is None:
        return []
    mean = chosen["psnr"]["mean"]
    facts = [(f"{chosen['computed']:g} of {grid['steps']}", "steps computed")]
    if chosen.get("speedup"):
        facts.append((f"{chosen['speedup']:.2f}×", "faster denoising"))
    facts += [(f"{mean:.1f} dB", "PSNR, mean"), (f"{chosen['psnr']['min']:.1f} dB", "PSNR, worst prompt")]
    rivals = [point for point in grid["points"] if point["kind"] != "tuned" and point["name"] != chosen["name"]]
    cheap = [point for point in rivals if point["computed"] <= chosen["computed"] + 1e-6]
    if cheap:
        best = max(cheap, key=lambda point: point["psnr"]["mean"])
        margin = mean - best["psnr"]["mean"]
        facts.append((f"{margin:+.1f} dB".replace("-", "−"), f"against the best other at no more computed steps "
                      f"({best['label']})"))
    equal = [point for point in rivals if point["psnr"]["mean"] >= mean and point["computed"] < grid["steps"]]
    if equal:
        first = min(equal, key=lambda point: point["computed"])
        facts.append((f"{first['computed']:g} steps", f"computed by the first other that reaches this mean "
                      f"({first['label']})"))
    elif rivals:
        facts.append(("none", "of the others tried reaches this mean with fewer than all steps"))
    return facts


def _grid(grid: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """One grid as the template takes it."""
    name, points = grid.get("chosen"), grid["points"]
    both = [
        [part(width) for width in (2 * charts.WIDTH, charts.WIDTH)]
        for part in (
            lambda width: charts.error_chart(points, name, width),
            lambda width: charts.mask_strips(_with_masks(grid), name, width),
        )
    ]
    table = sorted(points, key=lambda point: (-point["computed"], -point["psnr"]["mean"]))
    return {
        "title": f"{grid['steps']} steps, {'×'.join(str(side) for side in grid['size'])}",
        "verdict": grid.get("verdict"),
        "headline": headline(grid),
        "legend": [
            ("○" if look.mark == "ring" else "◇", look.colour, look.name)
            for kind, look in charts.LOOKS.items()
            if not look.joined and any(point["kind"] == kind for point in points)
        ],
        "panels": [plots.svg(panel) for panel in charts.quality_panels(points, name, _prompts(figures))],
        "charts": [[plots.svg(part) for part in pair] for pair in both if pair[0] is not None],
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
