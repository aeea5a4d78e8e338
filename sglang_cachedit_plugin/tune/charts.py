"""The charts of the report: quality against computed steps, error by step, schedules as strips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..evaluation.plots import FONT, Axis, Box, Drawing, Shape, along, place, span, text_width
from ..evaluation.quality import IDENTICAL_PSNR

WIDTH, HEIGHT = 430.0, 350.0
SMALL = 11.0
EQUAL_STEPS = 1.0
"""Mean computed steps by which two points may differ and still be compared as equal."""
GAPS = (8.0, 20.0, 34.0, 48.0)
"""Distances of a label from its point that are tried; the farther ones get a leader."""


@dataclass(frozen=True)
class Look:
    """How the points of one kind are drawn; ``joined`` kinds are one series with one label."""

    name: str
    colour: str
    mark: str
    joined: bool = False
    dashed: bool = False


LOOKS: Mapping[str, Look] = {
    "tuned": Look("tuned", "accent", "dot", joined=True),
    "fewer_steps": Look("fewer steps, no cache", "ink", "dot", joined=True),
    "growing_window": Look("growing window", "muted", "dot", joined=True, dashed=True),
    "baseline": Look("Cache-DiT settings", "warm", "ring"),
    "peer": Look("other caches", "violet", "diamond"),
}

Point = Mapping[str, Any]


def drawable(points: Sequence[Point]) -> list[Point]:
    """Points that have a place on the chart: all but those that equal the reference."""
    return [point for point in points if point["psnr"]["mean"] < IDENTICAL_PSNR]


def quality_panels(points: Sequence[Point], chosen: str | None, prompts: int | None) -> list[Drawing]:
    """PSNR against computed steps, the mean and the worst prompt, on the same axes."""
    shown = drawable(points)
    both = [point["psnr"][which] for point in shown for which in ("mean", "min")]
    axes = (
        Axis(*span([point["computed"] for point in shown]), 44, WIDTH - 14),
        Axis(*span(both), HEIGHT - 40, 34),
    )
    of = f" of {prompts} held-out prompts" if prompts else ""
    titles = {"mean": f"PSNR in dB, mean{of}", "min": f"PSNR in dB, worst{of}"}
    return [_quality_panel(shown, which, chosen, axes, title) for which, title in titles.items()]


def _quality_panel(
    points: Sequence[Point], which: str, chosen: str | None, axes: tuple[Axis, Axis], title: str
) -> Drawing:
    x, y = axes
    spots = {id(point): (x.at(point["computed"]), y.at(point["psnr"][which])) for point in points}
    marks, taken = [], []
    for point in sorted(points, key=lambda point: point["name"] == chosen):
        look, spot = LOOKS[point["kind"]], spots[id(point)]
        size = 6.5 if point["name"] == chosen else 3.6 if look.joined else 4.0
        taken.append((spot[0] - size, spot[1] - size, spot[0] + size, spot[1] + size))
        marks.append(Shape(
            kind=look.mark, points=(spot,), colour=look.colour, size=size,
            title=f"{point['label']}: {point['computed']:g} computed steps, {point['psnr'][which]:.1f} dB",
            data={"name": point["name"], "statistic": which},
        ))
    frame = (x.start - 6, y.end - 8, x.end + 10, y.start)
    lines = _lines(points, spots)
    covered = [box for line in lines for box in along(line.points)]
    labels = _labels(points, spots, chosen, (taken, covered), frame, which)
    shapes = [*_frame(axes, title, "computed steps"), *lines, *marks, *labels]
    return Drawing(
        width=WIDTH, height=HEIGHT, shapes=tuple(shapes), label=title,
        data={"statistic": which, "x-axis": _described(x), "y-axis": _described(y)},
    )


def _described(axis: Axis) -> str:
    return f"{axis.low!r} {axis.high!r} {axis.start!r} {axis.end!r}"


def _frame(axes: tuple[Axis, Axis], title: str, below: str) -> list[Shape]:
    """Title, grid, tick labels and the name of the horizontal axis."""
    x, y = axes
    shapes = [Shape(kind="text", points=((x.start - 40, 16),), text=title, size=FONT + 1, bold=True)]
    for value in y.ticks(8):
        level = y.at(value)
        shapes.append(Shape(kind="line", points=((x.start, level), (x.end, level)), colour="rule"))
        shapes.append(Shape(kind="text", points=((x.start - 6, level + 4),), text=f"{value:g}", anchor="end",
                            size=SMALL, colour="muted"))
    for value in x.ticks(8, least=1):
        shapes.append(Shape(kind="text", points=((x.at(value), y.start + 16),), text=f"{value:g}", anchor="middle",
                            size=SMALL, colour="muted"))
    shapes.append(Shape(kind="text", points=((x.end, y.start + 34),), text=below, anchor="end", size=SMALL,
                        colour="muted"))
    return shapes


def _series(points: Sequence[Point]) -> list[list[Point]]:
    """Points that a line joins: those of one kind and ``family``, by computed steps; single points have none."""
    def key(point: Point) -> str:
        return f"{point['kind']} {point.get('family') or ''}"

    ordered = sorted(points, key=lambda point: (key(point), point["computed"]))
    groups = [list(group) for _, group in groupby(ordered, key)]
    return [group for group in groups if LOOKS[group[0]["kind"]].joined or group[0].get("family")]


def _lines(points: Sequence[Point], spots: Mapping[int, tuple[float, float]]) -> list[Shape]:
    shapes = []
    for group in _series(points):
        look = LOOKS[group[0]["kind"]]
        size = 2.0 if look.joined else 1.0
        shapes.append(Shape(kind="line", points=tuple(spots[id(point)] for point in group), colour=look.colour,
                            size=size, dashed=look.dashed))
    return [shape for shape in shapes if len(shape.points) > 1]


def _labels(
    points: Sequence[Point], spots: Mapping[int, tuple[float, float]], chosen: str | None,
    taken: tuple[list[Box], list[Box]], frame: Box, which: str,
) -> list[Shape]:
    """The chosen point, then each series once, then single points from the best down, where there is room."""
    marks, lines = taken
    shapes = []
    for text, near, colour, bold in _wanted(points, chosen, which):
        size, at = FONT if bold else SMALL, [spots[id(point)] for point in near]
        found = next(filter(None, (place(text, at, marks, frame, size, lines, gap) for gap in GAPS)), None)
        if found is None and bold:
            found = place(text, at, marks, frame, size)
        if found is None:
            continue
        if found.leader is not None:
            shapes.append(Shape(kind="line", points=found.leader, colour=colour, size=0.6))
        shapes.append(Shape(kind="text", points=(found.spot,), text=text, colour=colour, anchor=found.anchor, size=size,
                            bold=bold))
    return shapes


def _wanted(points: Sequence[Point], chosen: str | None, which: str) -> list[tuple[str, list[Point], str, bool]]:
    """Labels in order of importance: text, the points it may stand at, colour, whether it matters most."""
    wanted: list[tuple[str, list[Point], str, bool]] = []
    for point in points:
        if point["name"] == chosen:
            text = f"chosen: {point['psnr'][which]:.1f} dB at {point['computed']:g}"
            wanted.append((text, [point], LOOKS[point["kind"]].colour, True))
    in_series: set[int] = set()
    for group in sorted(_series(points), key=lambda group: list(LOOKS).index(group[0]["kind"])):
        look = LOOKS[group[0]["kind"]]
        text = group[0].get("family") or look.name
        wanted.append((text, [group[-1], group[0], *group[1:-1]], look.colour, look.joined))
        in_series |= {id(point) for point in group}
    for point in sorted(points, key=lambda point: -point["psnr"][which]):
        if id(point) not in in_series:
            text = point["label"] if len(point["label"]) <= 24 else point["label"][:23] + "…"
            wanted.append((text, [point], LOOKS[point["kind"]].colour, False))
    return wanted


def error_chart(points: Sequence[Point], chosen: str | None, width: float = 2 * WIDTH) -> Drawing | None:
    """Error after each step for the chosen point and rivals of about as many computed steps; None without data."""
    picked = [point for point in points if point["name"] == chosen and point.get("step_errors")]
    if not picked:
        return None
    at = picked[0]["computed"]
    others = [
        point for point in points
        if point.get("step_errors") and point["name"] != chosen and abs(point["computed"] - at) <= EQUAL_STEPS
    ]
    order = sorted(others, key=lambda point: (point["kind"] == "tuned", abs(point["computed"] - at)))
    picked += order[: 3 if width > WIDTH else 2]
    steps = max(len(point["step_errors"]) for point in picked)
    room = min(width * 0.4, 20 + max(text_width(point["label"], SMALL) for point in picked))
    top = max(max(point["step_errors"]) for point in picked) or 1.0
    x, y = Axis(0, max(1, steps - 1), 54, width - room), Axis(0.0, top * 1.05, 220, 34)
    shapes = _frame((x, y), "Error after each step", "step (filled: computed, hollow: cached)")
    taken: list[Box] = []
    for point in picked:
        shapes += _error_line(point, point["name"] == chosen, (x, y), taken)
    return Drawing(width=width, height=260, shapes=tuple(shapes), label="Error after each step",
                   data={"x-axis": _described(x), "y-axis": _described(y)})


def _error_line(point: Point, is_chosen: bool, axes: tuple[Axis, Axis], taken: list[Box]) -> list[Shape]:
    x, y = axes
    colour = "accent" if is_chosen else LOOKS[point["kind"]].colour
    steps = len(point["step_errors"])
    spots = [(x.at(step), y.at(error)) for step, error in enumerate(point["step_errors"])]
    shapes = [Shape(kind="line", points=tuple(spots), colour=colour, size=2.0 if is_chosen else 1.2)]
    mask = point.get("mask")
    if isinstance(mask, Sequence) and len(mask) == steps:
        for spot, computed in zip(spots, mask, strict=True):
            shapes.append(Shape(kind="dot" if computed else "ring", points=(spot,), colour=colour, size=2.6))
    text, (right, level) = point["label"], spots[-1]
    frame = (right, y.end - 8, right + 400, y.start + 8)
    spread = [(right, level + shift) for shift in (0, 12, -12, 24, -24, 36, -36, 48, -48)]
    found = place(text, spread, taken, frame, SMALL)
    if found is not None:
        shapes.append(Shape(kind="text", points=(found.spot,), text=text, colour=colour, anchor=found.anchor,
                            size=SMALL, bold=is_chosen))
    return shapes


def masks(point: Point) -> list[tuple[str, Sequence[int]]]:
    """The point's schedules as (whose, mask); a mapping has one for each branch or transformer."""
    mask = point.get("mask")
    if isinstance(mask, Mapping):
        return [(str(whose), values) for whose, values in mask.items() if values]
    return [("", mask)] if mask else []


def mask_strips(points: Sequence[Point], chosen: str | None, width: float = 2 * WIDTH) -> Drawing | None:
    """One row of cells a schedule, filled where the step is computed; None where no point has one."""
    rows = [
        (f"{point['label']} {whose}".strip(), values, point)
        for point in points for whose, values in masks(point)
    ]
    if not rows:
        return None
    above = width <= WIDTH  # on narrow screens the label stands over its strip
    left = 4.0 if above else 12 + max(text_width(label, SMALL) for label, _, _ in rows)
    line = 36.0 if above else 20.0
    x = Axis(0, max(len(values) for _, values, _ in rows), left, width - 62)
    shapes = [Shape(kind="text", points=((4, 16),), text="Schedules (filled: computed)", size=FONT + 1, bold=True)]
    for index, (label, values, point) in enumerate(rows):
        top = 30 + index * line
        look, is_chosen = LOOKS[point["kind"]], point["name"] == chosen
        spot, anchor = ((left, top + 10), "start") if above else ((left - 8, top + 12), "end")
        shapes.append(Shape(kind="text", points=(spot,), text=label, anchor=anchor, size=SMALL,
                            colour=look.colour if is_chosen else "ink", bold=is_chosen))
        shapes += _strip(values, x, top + 15 if above else top, look.colour)
    return Drawing(width=width, height=34 + line * len(rows), shapes=tuple(shapes), label="Schedules as strips")


def _strip(values: Sequence[int], x: Axis, top: float, colour: str) -> list[Shape]:
    cells = [
        Shape(kind="bar", points=((x.at(step) + 0.75, top), (x.at(step + 1) - 0.75, top + 15)),
              colour=colour if computed else "rule")
        for step, computed in enumerate(values)
    ]
    total = f"{sum(map(bool, values))} of {len(values)}"
    return [*cells, Shape(kind="text", points=((x.at(len(values)) + 6, top + 12),), size=SMALL, colour="muted",
                          text=total)]
