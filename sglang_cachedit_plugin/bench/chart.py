"""The chart of a comparison: time of every variant, its ideal, and how near its pictures are."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.plots import FONT, SMALL, Panel, paint, png
from .variants import PLUGIN, STOCK, UNCACHED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {UNCACHED: "muted", STOCK: "warm", PLUGIN: "accent"}


def bars(rows: Sequence[Mapping[str, Any]], title: str, steps: int) -> Panel:
    """One bar a variant: seconds of denoising, lighter the rest of the request; a tick marks the ideal."""
    left = 16 + 7.5 * max(len(row["name"]) for row in rows)
    return Panel(title=title, width=860.0, height=70 + 34.0 * len(rows), margins=(left, 320, 48, 8),
                 draw=functools.partial(_bars, rows, steps))


def _bars(rows: Sequence[Mapping[str, Any]], steps: int, axes: Axes) -> None:
    longest = max((row["seconds"] or 0.0 for row in rows), default=0.0) or 1.0
    axes.set_axis_off()
    axes.set(xlim=(0, longest), ylim=(len(rows), 0))
    axes.annotate("Seconds an output. Full colour: denoising; pale: the rest of the request; line: the ideal, computed "
                  "steps at the uncached step time.", (0, 1), (4, -36), xycoords=("figure fraction", "figure fraction"),
                  textcoords="offset points", color=paint("muted"), fontsize=SMALL)
    uncached = next((row["denoising_s"] for row in rows if row["kind"] == UNCACHED), None)
    for index, row in enumerate(rows):
        middle = index + 0.5
        axes.annotate(row["name"], (0, middle), (-8, 0), textcoords="offset points", ha="right", va="center",
                      fontsize=FONT, weight="bold" if row["kind"] == PLUGIN else "normal", color=paint("ink"),
                      parse_math=False)
        whole = row["seconds"] or 0.0
        axes.barh(middle, whole, 0.64, color=paint("rule"))
        axes.barh(middle, min(row["denoising_s"] or whole, whole), 0.64, color=paint(COLOURS[row["kind"]]))
        if row["efficiency"] is not None and row["kind"] != UNCACHED and uncached is not None:
            ideal = uncached * row["computed"] / steps
            axes.plot([ideal, ideal], [middle - 0.4, middle + 0.4], color=paint("ink"), linewidth=1.6)
        axes.annotate(words(row), (whole, middle), (8, 0), textcoords="offset points", va="center", fontsize=SMALL,
                      color=paint("warm" if row["seconds"] is None else "ink"), annotation_clip=False,
                      parse_math=False)


def words(row: Mapping[str, Any]) -> str:
    """What stands beside a bar."""
    if row["seconds"] is None:
        return f"failed: {row['error'] or 'no figure'}"[:100]
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
    png([bars(rows, title, steps)], path)
