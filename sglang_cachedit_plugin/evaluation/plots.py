"""What charts share: colours of both themes, panels as inline SVG or as one PNG, labels that stand clear."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: Mapping[str, tuple[str, str]] = {
    "ink": ("#1c2430", "#e8ecf2"),
    "muted": ("#5d6878", "#9aa6b6"),
    "rule": ("#dfe4ea", "#333c48"),
    "paper": ("#ffffff", "#141a21"),
    "panel": ("#f5f7f9", "#1b222b"),
    "accent": ("#0b62c4", "#6cb0ff"),
    "warm": ("#b4530a", "#f0a35e"),
    "violet": ("#7a3fa0", "#c79be6"),
}
"""Name to (light, dark). Text colours have at least 4.5:1 on the paper in both."""
FONT, SMALL = 12.0, 11.0
WIDTH = 430.0
_GAPS = (7.0, 14.0, 22.0)
_AROUND = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))


def paint(name: str) -> str:
    """The light colour; ``svg`` puts the page's own in its place."""
    return COLOURS[name][0]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart.

    Args:
        draw: draws into axes that are styled and placed.
        height, width, margins: in pixels at 72 dots an inch; margins are left, right, top and bottom.
    """

    title: str
    draw: Callable[[Axes], None]
    height: float = 350.0
    width: float = WIDTH
    margins: tuple[float, float, float, float] = (44.0, 14.0, 34.0, 42.0)

    def onto(self, figure: Any, left: float, top: float) -> None:
        """Draw with the upper left corner at ``left`` and ``top`` pixels of ``figure``."""
        wide, high = figure.get_size_inches() * 72
        before, after, above, below = self.margins
        axes = figure.add_axes((
            (left + before) / wide, 1 - (top + self.height - below) / high,
            (self.width - before - after) / wide, (self.height - above - below) / high,
        ))
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.tick_params(length=0, labelsize=SMALL, labelcolor=paint("muted"))
        axes.grid(color=paint("rule"), clip_on=False)
        axes.set_axisbelow(True)
        axes.annotate(self.title, (0, 1), (4 - before, above - 16), xycoords="axes fraction", color=paint("ink"),
                      textcoords="offset points", fontsize=FONT + 1, weight="bold", parse_math=False)
        self.draw(axes)


def svg(panel: Panel) -> str:
    """Inline SVG on no ground; colours are the page's custom properties ``--ink``, ``--accent`` and so on."""
    import matplotlib
    from matplotlib.figure import Figure

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title}):
        figure = Figure(figsize=(panel.width / 72, panel.height / 72), dpi=72)
        panel.onto(figure, 0, 0)
        figure.savefig(out, format="svg", transparent=True)
    text = re.sub(r'<metadata>.*</metadata>|<style.*?</style>|<clipPath.*?</clipPath>| clip-path="[^"]*"', "",
                  out.getvalue(), flags=re.DOTALL)
    text = text[text.index(">", text.index("<svg")) + 1 :]
    for name, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{name})")
    size = f'viewBox="0 0 {panel.width:g} {panel.height:g}"'
    return f'<svg {size} role="img" aria-label="{escape(panel.title)}">{text}'


def png(panels: Sequence[Panel], path: Path, columns: int = 2) -> None:
    """Panels in rows on one light picture, two pixels a unit."""
    from matplotlib.figure import Figure

    rows = [panels[first : first + columns] for first in range(0, len(panels), columns)]
    wide = max(sum(panel.width for panel in row) for row in rows)
    high = sum(max(panel.height for panel in row) for row in rows)
    figure = Figure(figsize=(wide / 72, high / 72), dpi=144, facecolor=paint("paper"))
    top = 0.0
    for row in rows:
        left = 0.0
        for panel in row:
            panel.onto(figure, left, top)
            left += panel.width
        top += max(panel.height for panel in row)
    figure.savefig(path)


class Labels:
    """Writes texts beside points, where they cover no point, no line and no other text.

    Args:
        axes: with all its lines drawn and its limits set.
    """

    def __init__(self, axes: Axes):
        from matplotlib.transforms import Bbox

        self._axes, self._bbox = axes, Bbox
        self._lines = [line.get_transform().transform_path(line.get_path()) for line in axes.lines]
        self._scale = axes.figure.dpi / 72
        spots = [axes.transData.transform(line.get_xydata()) for line in axes.lines if line.get_marker() != "None"]
        self.taken = [self._box(*spot, 0, 0, 5) for spot in np.concatenate([*spots, np.empty((0, 2))])]

    def _box(self, left: float, bottom: float, width: float, height: float, more: float) -> Any:
        more *= self._scale
        return self._bbox.from_bounds(left - more, bottom - more, width + 2 * more, height + 2 * more)

    def add(self, text: str, spots: Sequence[tuple[float, float]], colour: str, *, bold: bool = False) -> bool:
        """Write ``text`` at the first of ``spots`` (data coordinates) where there is room; False where there is none.
        """
        note = self._axes.annotate(
            text, spots[0], (0, 0), textcoords="offset points", color=paint(colour), parse_math=False,
            fontsize=FONT if bold else SMALL, weight="bold" if bold else "normal", annotation_clip=False,
            bbox={"facecolor": paint("paper"), "linewidth": 0, "pad": 0.5},
        )
        extent = note.get_window_extent()
        frame = self._axes.bbox
        right_end = frame.x1 + 10 * self._scale
        for gap, spot, (right, up) in product(_GAPS, spots, _AROUND):
            x, y = self._axes.transData.transform(spot)
            box = self._box(
                x + right * gap * self._scale + (right - 1) / 2 * extent.width,
                y + up * gap * self._scale + (up - 1) / 2 * extent.height, extent.width, extent.height, 1,
            )
            inside = frame.x0 <= box.x0 and box.x1 <= right_end and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if not inside or box.count_overlaps(self.taken):
                continue
            if any(line.intersects_bbox(box, filled=False) for line in self._lines):
                continue
            note.xy = spot
            note.set(position=(right * gap, up * gap), ha=("right", "center", "left")[right + 1],
                     va=("top", "center", "bottom")[up + 1])
            self.taken.append(box)
            return True
        note.remove()
        return False
