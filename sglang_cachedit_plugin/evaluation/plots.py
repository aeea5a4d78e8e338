"""Charts as a list of shapes in pixels, written as inline SVG that follows the page's theme, or as a light PNG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

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

FONT = 12.0
_CHARACTER = 0.56  # mean advance of a sans-serif letter in ems


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One mark. ``kind``: line (polyline), dot, ring, diamond, bar or text; positions in pixels from the top left."""

    kind: str
    points: tuple[tuple[float, float], ...]
    colour: str = "ink"
    size: float = 1.0
    dashed: bool = False
    text: str = ""
    anchor: str = "start"
    bold: bool = False
    title: str = ""
    data: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Shapes on a canvas of ``width`` by ``height`` pixels; ``data`` describes the axes to whoever reads the SVG."""

    width: float
    height: float
    shapes: tuple[Shape, ...]
    label: str
    data: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels; ``low`` lies at ``start``, ``high`` at ``end``."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int, *, least: float = 0.0) -> list[float]:
        """At most about ``most`` round values within the axis, ``least`` or more apart."""
        rough = max(least, (self.high - self.low) / max(1, most))
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * unit for unit in (1, 2, 5, 10) if power * unit >= rough)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(index * step, 10) for index in range(first, last + 1)]


def span(values: Iterable[float], margin: float = 0.06) -> tuple[float, float]:
    """Range of the values with a margin; never empty."""
    values = list(values)
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = (high - low) * margin or max(1.0, abs(high) * margin)
    return low - room, high + room


def text_width(text: str, size: float = FONT) -> float:
    """About how many pixels a text takes."""
    return len(text) * size * _CHARACTER


Box = tuple[float, float, float, float]


def overlaps(one: Box, other: Box) -> bool:
    """Whether two boxes (left, top, right, bottom) share any area."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def along(points: Sequence[tuple[float, float]], every: float = 4.0) -> list[Box]:
    """Small boxes that cover a line, for labels to keep clear of."""
    boxes = []
    for (x, y), (right, low) in pairwise(points):
        count = max(1, round(math.hypot(right - x, low - y) / every))
        spots = [(x + (right - x) * i / count, y + (low - y) * i / count) for i in range(count + 1)]
        boxes += [(px - 1, py - 1, px + 1, py + 1) for px, py in spots]
    return boxes


@dataclass(frozen=True)
class Placed:
    """A label's place: baseline ``spot``, text anchor, and a line from its point where it stands apart."""

    spot: tuple[float, float]
    anchor: str
    leader: tuple[tuple[float, float], tuple[float, float]] | None


def place(
    text: str, spots: Sequence[tuple[float, float]], taken: list[Box], frame: Box, size: float = FONT,
    avoid: Sequence[Box] = (), gap: float = 8.0,
) -> Placed | None:
    """Where a label fits next to one of its spots, None where it would cover something.

    The box that it takes is added to ``taken``; ``avoid`` are more boxes to keep clear of.
    """
    wide, high = text_width(text, size), size
    for x, y in spots:
        for dx, dy, anchor in (
            (gap, 0, "start"), (-gap, 0, "end"), (0, -gap - high / 2, "middle"), (0, gap + high / 2, "middle"),
            (gap, -gap - 4, "start"), (-gap, -gap - 4, "end"), (gap, gap + 4, "start"), (-gap, gap + 4, "end"),
        ):
            left = x + dx - {"start": 0.0, "end": wide, "middle": wide / 2}[anchor]
            box = (left, y + dy - high / 2, left + wide, y + dy + high / 2)
            inside = frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]
            if inside and not any(overlaps(box, other) for other in (*taken, *avoid)):
                taken.append(box)
                near = (x + dx, y + dy - (high / 2) * (anchor == "middle" and (dy > 0) - (dy < 0)))
                leader = ((x, y), near) if gap > 10 else None
                return Placed((x + dx, y + dy + 0.36 * high), anchor, leader)
    return None


def svg(drawing: Drawing) -> str:
    """Inline SVG; colours are the custom properties ``--ink``, ``--accent`` and so on."""
    root = ElementTree.Element("svg", {
        "viewBox": f"0 0 {drawing.width:g} {drawing.height:g}", "role": "img", "aria-label": drawing.label,
        **_data(drawing.data),
    })
    for shape in drawing.shapes:
        element = _SVG[shape.kind](root, shape)
        for name, value in _data(shape.data).items():
            element.set(name, value)
        if shape.title:
            ElementTree.SubElement(element, "title").text = shape.title
    return ElementTree.tostring(root, encoding="unicode")


def _data(values: Mapping[str, object]) -> dict[str, str]:
    return {f"data-{name}": str(value) for name, value in values.items()}


def _svg_line(root: ElementTree.Element, shape: Shape) -> ElementTree.Element:
    return ElementTree.SubElement(root, "polyline", {
        "points": " ".join(f"{x:.2f},{y:.2f}" for x, y in shape.points),
        "style": f"fill:none;stroke:var(--{shape.colour});stroke-width:{shape.size:g};stroke-linejoin:round"
        + (";stroke-dasharray:4 3" if shape.dashed else ""),
    })


def _svg_dot(root: ElementTree.Element, shape: Shape) -> ElementTree.Element:
    ring = shape.kind == "ring"
    return ElementTree.SubElement(root, "circle", {
        "cx": f"{shape.points[0][0]:.3f}", "cy": f"{shape.points[0][1]:.3f}", "r": f"{shape.size:g}",
        "style": f"fill:var(--{'paper' if ring else shape.colour});stroke:var(--{shape.colour if ring else 'paper'});"
        f"stroke-width:{1.6 if ring else 1}",
    })


def _svg_diamond(root: ElementTree.Element, shape: Shape) -> ElementTree.Element:
    return ElementTree.SubElement(root, "polygon", {
        "points": " ".join(f"{x:.3f},{y:.3f}" for x, y in _diamond(shape)),
        "style": f"fill:var(--paper);stroke:var(--{shape.colour});stroke-width:1.6",
    })


def _diamond(shape: Shape) -> list[tuple[float, float]]:
    (x, y), r = shape.points[0], shape.size * 1.25
    return [(x, y - r), (x + r, y), (x, y + r), (x - r, y)]


def _svg_bar(root: ElementTree.Element, shape: Shape) -> ElementTree.Element:
    (left, top), (right, bottom) = shape.points
    return ElementTree.SubElement(root, "rect", {
        "x": f"{left:.2f}", "y": f"{top:.2f}", "width": f"{max(0.0, right - left):.2f}",
        "height": f"{bottom - top:.2f}", "style": f"fill:var(--{shape.colour})",
    })


def _svg_text(root: ElementTree.Element, shape: Shape) -> ElementTree.Element:
    element = ElementTree.SubElement(root, "text", {
        "x": f"{shape.points[0][0]:.2f}", "y": f"{shape.points[0][1]:.2f}", "text-anchor": shape.anchor,
        "style": f"fill:var(--{shape.colour});font-size:{shape.size:g}px;paint-order:stroke;stroke:var(--paper);"
        "stroke-width:3px;stroke-linejoin:round" + (";font-weight:600" if shape.bold else ""),
    })
    element.text = shape.text
    return element


_SVG = {
    "line": _svg_line, "dot": _svg_dot, "ring": _svg_dot, "diamond": _svg_diamond, "bar": _svg_bar, "text": _svg_text,
}


def png(rows: Sequence[Sequence[Drawing]], path: Path, scale: float = 2.0) -> None:
    """Drawings in rows on one light picture, at ``scale`` pixels a unit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wide = max(sum(drawing.width for drawing in row) for row in rows)
    high = sum(max(drawing.height for drawing in row) for row in rows)
    figure = Figure(figsize=(wide / 72, high / 72), dpi=72 * scale, facecolor=COLOURS["paper"][0])
    canvas = FigureCanvasAgg(figure)
    top = 0.0
    for row in rows:
        left = 0.0
        for drawing in row:
            axes = figure.add_axes((left / wide, 1 - (top + drawing.height) / high, drawing.width / wide,
                                    drawing.height / high))
            axes.set(xlim=(0, drawing.width), ylim=(drawing.height, 0))
            axes.set_axis_off()
            for order, shape in enumerate(drawing.shapes):
                _paint(axes, shape, order + 2)
            left += drawing.width
        top += max(drawing.height for drawing in row)
    canvas.print_png(str(path))


def _paint(axes, shape: Shape, order: int) -> None:
    from matplotlib import patches, patheffects

    colour, paper = COLOURS[shape.colour][0], COLOURS["paper"][0]
    x, y = shape.points[0]
    if shape.kind == "line":
        axes.plot(*zip(*shape.points, strict=True), color=colour, linewidth=shape.size, zorder=order,
                  linestyle=(0, (4, 3)) if shape.dashed else "-", solid_joinstyle="round")
    elif shape.kind in ("dot", "ring"):
        inside, edge = (paper, colour) if shape.kind == "ring" else (colour, paper)
        axes.add_patch(patches.Circle((x, y), shape.size, facecolor=inside, edgecolor=edge, linewidth=1.3,
                                      zorder=order))
    elif shape.kind == "diamond":
        axes.add_patch(patches.Polygon(_diamond(shape), facecolor=paper, edgecolor=colour, linewidth=1.3,
                                       zorder=order))
    elif shape.kind == "bar":
        right, bottom = shape.points[1]
        axes.add_patch(patches.Rectangle((x, y), max(0.0, right - x), bottom - y, facecolor=colour, linewidth=0,
                                         zorder=order))
    else:
        axes.text(x, y, shape.text.replace("$", r"\$"), color=colour, fontsize=shape.size * 0.92, zorder=order,
                  ha={"start": "left", "end": "right", "middle": "center"}[shape.anchor], va="baseline",
                  weight="bold" if shape.bold else "normal",
                  path_effects=[patheffects.withStroke(linewidth=2.5, foreground=paper)])
