"""The charts of the report: quality against computed steps, error by step, schedules as strips."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..evaluation.plots import SMALL, Labels, Panel, paint
from ..evaluation.quality import IDENTICAL_PSNR

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EQUAL_STEPS = 1.0
"""Mean computed steps by which two points may differ and still be compared as equal."""
STATISTICS = {"mean": "mean", "p10": "10th percentile", "min": "worst"}
Point = Mapping[str, Any]


@dataclass(frozen=True)
class Look:
    """How the points of one kind are drawn."""

    name: str
    colour: str
    marker: str
    line: str = "-"


LOOKS: Mapping[str, Look] = {
    "tuned": Look("tuned", "accent", "o"),
    "fewer_steps": Look("fewer steps, no cache", "ink", "o"),
    "growing_window": Look("growing window", "muted", "o", "--"),
    "baseline": Look("Cache-DiT settings", "warm", "s"),
    "host": Look("the host's caches", "violet", "D"),
}


def front(points: Sequence[Point], which: str) -> list[Point]:
    """Points that no other computes as little for as much quality, by computed steps."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point["computed"], -point["psnr"][which])):
        if not found or point["psnr"][which] > found[-1]["psnr"][which]:
            found.append(point)
    return found


def shown(points: Sequence[Point], which: str, chosen: str | None) -> dict[str, list[Point]]:
    """The front of each kind, and the chosen point; what equals the reference has no place on the chart."""
    drawable = [point for point in points if point["psnr"]["mean"] < IDENTICAL_PSNR]
    fronts = {kind: front([point for point in drawable if point["kind"] == kind], which) for kind in LOOKS}
    for point in drawable:
        if point["name"] == chosen and point not in fronts[point["kind"]]:
            fronts[point["kind"]].append(point)
    return {kind: found for kind, found in fronts.items() if found}


def quality_panels(points: Sequence[Point], chosen: str | None, prompts: int | None) -> list[Panel]:
    """PSNR against computed steps on the same axes: mean, 10th percentile and worst prompt."""
    statistics = {each: name for each, name in STATISTICS.items() if all(each in point["psnr"] for point in points)}
    every = [point for each in statistics for found in shown(points, each, chosen).values() for point in found]
    values = [point["psnr"][each] for point in every for each in statistics]
    limits = _span([point["computed"] for point in every]), _span(values)
    of = f" of {prompts} held-out prompts" if prompts else ""
    return [
        Panel(title=f"PSNR in dB, {name}{of}",
              draw=functools.partial(_quality, shown(points, each, chosen), each, chosen, limits))
        for each, name in statistics.items()
    ]


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def _quality(
    fronts: Mapping[str, Sequence[Point]], which: str, chosen: str | None, limits: Sequence[tuple[float, float]],
    axes: Axes,
) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlim=limits[0], ylim=limits[1])
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("computed steps", loc="right", color=paint("muted"), fontsize=SMALL)
    for kind, points in fronts.items():
        look = LOOKS[kind]
        axes.plot([p["computed"] for p in points], [p["psnr"][which] for p in points], look.line, clip_on=False,
                  color=paint(look.colour), linewidth=2.0 if kind == "tuned" else 1.2)
        for point in points:
            axes.plot(point["computed"], point["psnr"][which], look.marker, color=paint(look.colour), clip_on=False,
                      markersize=12 if point["name"] == chosen else 6, gid=f"{which}:{point['name']}",
                      markeredgecolor=paint("paper"))
    labels = Labels(axes)

    def spots(points: Sequence[Point]) -> list[tuple[float, float]]:
        return [(point["computed"], point["psnr"][which]) for point in points]

    for kind, points in fronts.items():
        for point in points:
            if point["name"] == chosen:
                text = f"chosen: {point['psnr'][which]:.1f} dB at {point['computed']:g}"
                labels.add(text, spots([point]), LOOKS[kind].colour, bold=True)
    for kind, points in fronts.items():
        labels.add(LOOKS[kind].name, spots([points[-1], *points[:-1]]), LOOKS[kind].colour)
    for kind in ("host", "baseline"):
        for point in reversed(fronts.get(kind, [])):
            labels.add(_short(point["label"]), spots([point]), LOOKS[kind].colour)


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def error_panel(points: Sequence[Point], chosen: str | None) -> Panel | None:
    """Error after each step for the chosen point and two of about as many computed steps; None without data."""
    measured = [point for point in points if point.get("step_errors")]
    picked = [point for point in measured if point["name"] == chosen]
    if not picked:
        return None
    at = picked[0]["computed"]
    others = [p for p in measured if p["name"] != chosen and abs(p["computed"] - at) <= EQUAL_STEPS]
    picked += sorted(others, key=lambda p: (p["kind"] == "tuned", abs(p["computed"] - at)))[:2]
    return Panel(title="Error after each step", draw=functools.partial(_errors, picked),
                 margins=(54, 14, 30 + 16 * len(picked), 42))


def _errors(points: Sequence[Point], axes: Axes) -> None:
    for point in points:
        errors, mask = point["step_errors"], point.get("mask")
        colour = paint(LOOKS[point["kind"]].colour)
        axes.plot(errors, color=colour, linewidth=1.4, label=_short(point["label"]), clip_on=False)
        if isinstance(mask, Sequence) and len(mask) == len(errors):
            for marks, face in ((1, colour), (0, paint("paper"))):
                steps = [step for step, computed in enumerate(mask) if computed == marks]
                axes.plot(steps, [errors[step] for step in steps], "o", color=colour, markerfacecolor=face,
                          markersize=4.5, clip_on=False)
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("step (filled: computed, hollow: cached)", loc="right", color=paint("muted"), fontsize=SMALL)
    legend = axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, labelcolor="linecolor", borderpad=0)
    for text in legend.get_texts():
        text.set(fontsize=SMALL, parse_math=False)


def strips(points: Sequence[Point]) -> list[tuple[str, Sequence[int], Point]]:
    """Label, mask and point of each schedule; a mapping has one for each branch or transformer."""
    found: list[tuple[str, Sequence[int], Point]] = []
    for point in points:
        mask = point.get("mask")
        parts = mask.items() if isinstance(mask, Mapping) else [("", mask)]
        found += [(f"{point['label']} {whose}".strip(), values, point) for whose, values in parts if values]
    return found


def strips_panel(points: Sequence[Point], chosen: str | None) -> Panel | None:
    """One row of cells a schedule, filled where the step is computed; None where no point has one."""
    rows = strips(points)
    if not rows:
        return None
    return Panel(title="Schedules (filled: computed)", height=34.0 + 36 * len(rows), margins=(4, 62, 28, 4),
                 draw=functools.partial(_strips, rows, chosen))


def _strips(rows: Sequence[tuple[str, Sequence[int], Point]], chosen: str | None, axes: Axes) -> None:
    axes.set_axis_off()
    axes.set(xlim=(0, max(len(values) for _, values, _ in rows)), ylim=(len(rows), 0))
    for row, (label, values, point) in enumerate(rows):
        colour, is_chosen = LOOKS[point["kind"]].colour, point["name"] == chosen
        axes.barh(row + 0.72, 0.9, 0.44, [step + 0.05 for step in range(len(values))],
                  color=[paint(colour if computed else "rule") for computed in values])
        axes.text(0, row + 0.4, _short(label, 60), color=paint(colour if is_chosen else "ink"), fontsize=SMALL,
                  weight="bold" if is_chosen else "normal", parse_math=False)
        axes.text(len(values) + 0.3, row + 0.72, f"{sum(map(bool, values))} of {len(values)}", va="center",
                  color=paint("muted"), fontsize=SMALL)
