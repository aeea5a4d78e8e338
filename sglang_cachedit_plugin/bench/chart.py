"""The chart of a comparison: time of every variant, its ideal, and how near its pictures are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.plots import FONT, Axis, Drawing, Shape, png, text_width
from .variants import PLUGIN, STOCK, UNCACHED

COLOURS = {UNCACHED: "muted", STOCK: "warm", PLUGIN: "accent"}
WIDTH, LINE, SMALL = 860.0, 34.0, 11.0


def bars(rows: Sequence[Mapping[str, Any]], title: str, steps: int) -> Drawing:
    """One bar a variant: seconds of denoising, lighter the rest of the request; a tick marks the ideal."""
    left = 16 + max(text_width(row["name"]) for row in rows)
    longest = max((row["seconds"] or 0.0 for row in rows), default=0.0) or 1.0
    axis = Axis(0.0, longest, left, WIDTH - 320)
    shapes = [
        Shape(kind="text", points=((4, 18),), text=title, size=FONT + 1, bold=True),
        Shape(kind="text", points=((4, 36),), size=SMALL, colour="muted",
              text="Seconds an output. Full colour: denoising; pale: the rest of the request; line: the ideal, "
              "computed steps at the uncached step time."),
    ]
    uncached = next((row["denoising_s"] for row in rows if row["kind"] == UNCACHED), None)
    for index, row in enumerate(rows):
        shapes += _bar(row, 52 + index * LINE, axis, uncached, steps)
    return Drawing(width=WIDTH, height=60 + LINE * len(rows), shapes=tuple(shapes), label=title)


def _bar(
    row: Mapping[str, Any], top: float, axis: Axis, uncached: float | None, steps: int
) -> list[Shape]:
    middle, low = top + 15, top + 22
    shapes = [Shape(kind="text", points=((axis.start - 8, middle),), text=row["name"], anchor="end",
                    size=FONT, bold=row["kind"] == PLUGIN)]
    if row["seconds"] is None:
        text = f"failed: {row['error'] or 'no figure'}"
        return [*shapes, Shape(kind="text", points=((axis.start, middle),), colour="warm", size=SMALL,
                               text=text if len(text) < 100 else text[:99] + "…")]
    whole, denoising = axis.at(row["seconds"]), axis.at(min(row["denoising_s"] or row["seconds"], row["seconds"]))
    shapes.append(Shape(kind="bar", points=((axis.start, top), (whole, low)), colour="rule"))
    shapes.append(Shape(kind="bar", points=((axis.start, top), (denoising, low)), colour=COLOURS[row["kind"]]))
    if row["efficiency"] is not None and row["kind"] != UNCACHED and uncached is not None:
        ideal = axis.at(uncached * row["computed"] / steps)
        shapes.append(Shape(kind="line", points=((ideal, top - 3), (ideal, low + 3)), colour="ink", size=1.6))
    return [*shapes, Shape(kind="text", points=((whole + 8, middle),), text=_words(row), size=SMALL)]


def _words(row: Mapping[str, Any]) -> str:
    parts = [f"{row['seconds']:.2f} s"]
    if row["kind"] != UNCACHED and row["speedup"] is not None:
        parts.append(f"{row['speedup']:.2f}×")
    if row["computed"] is not None:
        parts.append(f"{'about ' if row['computed_is_estimated'] else ''}{row['computed']:g} computed")
    if row.get("psnr"):
        parts.append(f"{row['psnr']['mean']:.1f} dB (worst {row['psnr']['min']:.1f})")
    if row["failed"]:
        parts.append(f"{row['failed']} failed")
    return ", ".join(parts)


def write(rows: Sequence[Mapping[str, Any]], title: str, steps: int, path: Path) -> None:
    """The chart as PNG."""
    png([[bars(rows, title, steps)]], path)
