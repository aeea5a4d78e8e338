"""Chart of the rows that ``benchmarks.quality --out`` wrote: ``python -m benchmarks.chart FILE... --out chart.png``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

PANELS = (("mean", np.mean), ("10th percentile", lambda values: np.percentile(values, 10)), ("worst", np.min))
LINES = {
    "tolerance ": ("error control", "tab:blue", "o"),
    "fewer steps, Euler": ("fewer steps, Euler", "tab:gray", "s"),
    "fewer steps, UniPC": ("fewer steps, UniPC", "tab:brown", "s"),
    "fewer steps, DPM": ("fewer steps, DPM-Solver++", "tab:olive", "s"),
}
POINTS = {"off": ("DBCache, SCM, TaylorSeer, DMD: corrector off", "tab:red", "x"),
          "on": ("the same: corrector on", "tab:green", "+")}


def merged(files: Sequence[Path]) -> dict[str, Any]:
    """Rows of several files by setting; the last file that has a setting counts."""
    found: dict[str, Any] = {}
    for file in files:
        found.update(json.loads(file.read_text())["rows"])
    return found


def draw(rows: Mapping[str, Any], title: str, out: Path) -> None:
    """One panel for the mean, the 10th percentile and the worst picture; to the left and up is better."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    for axes, (name, measure) in zip(figure.subplots(1, 3, sharey=True), PANELS, strict=True):
        for prefix, (label, colour, marker) in LINES.items():
            points = sorted(
                (np.mean([row[1] for row in each]), measure([row[2] for row in each]), setting)
                for setting, each in rows.items() if setting.startswith(prefix)
            )
            if points:
                places = [point[0] for point in points], [point[1] for point in points]
                axes.plot(*places, marker=marker, color=colour, label=label)
            if prefix == "tolerance ":
                for x, y, setting in points:
                    axes.annotate(setting.removeprefix(prefix), (x, y), textcoords="offset points", xytext=(5, -9),
                                  fontsize=7, color=colour)
        for end, (label, colour, marker) in POINTS.items():
            points = [
                (np.mean([row[1] for row in each]), measure([row[2] for row in each]))
                for setting, each in rows.items() if setting.endswith(f"| {end}") and not setting.startswith("output")
            ]
            axes.scatter(*zip(*points, strict=True), marker=marker, color=colour, label=label)
        axes.set(title=name, xlabel="computed steps of 28")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("PSNR against 28 computed steps, dB")
    figure.axes[0].legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chart", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--title", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    draw(merged(args.files), args.title, args.out)


if __name__ == "__main__":
    main()
