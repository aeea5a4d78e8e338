"""Chart of a table of ``benchmarks.quality``: ``python -m benchmarks.chart docs/results/quality-image.md OUT.png``."""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

PANELS = ("mean", "10th percentile", "worst")
LINES = {
    "tolerance ": ("error control", "tab:blue", "o"),
    "fewer steps, Euler": ("fewer steps, Euler", "tab:gray", "s"),
    "fewer steps, UniPC": ("fewer steps, UniPC", "tab:brown", "s"),
}
POINTS = {
    "corrector off": ("DBCache, SCM, TaylorSeer, DMD: corrector off", "tab:red", "x"),
    "corrector on": ("the same: corrector on", "tab:green", "+"),
}


def read(path: Path) -> tuple[str, dict[str, list[float]]]:
    """Title, and computed steps with mean, 10th percentile and worst PSNR of each setting."""
    text = path.read_text(encoding="utf-8")
    rows = {}
    for line in text.splitlines():
        name, *cells = (cell.strip() for cell in line.replace("\\|", ":").strip("|").split("|"))
        if len(cells) == 4 and cells[0][:1].isdigit():
            rows[name] = [float(cell) for cell in cells]
    return text.splitlines()[0].removeprefix("# "), rows


def draw(title: str, rows: dict[str, list[float]], out: Path) -> None:
    """One panel for the mean, the 10th percentile and the worst picture; to the left and up is better."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    for index, (axes, panel) in enumerate(zip(figure.subplots(1, 3, sharey=True), PANELS, strict=True), start=1):
        for prefix, (label, colour, marker) in LINES.items():
            own = sorted(
                (row[0], row[index], name) for name, row in rows.items()
                if name.startswith(prefix) and not name.endswith("corrector off")
            )
            axes.plot([each[0] for each in own], [each[1] for each in own], marker=marker, color=colour, label=label)
            for x, y, name in own if prefix == "tolerance " else ():
                axes.annotate(name.removeprefix(prefix), (x, y), textcoords="offset points", xytext=(5, -9),
                              fontsize=7, color=colour)
        for end, (label, colour, marker) in POINTS.items():
            points = [
                (row[0], row[index]) for name, row in rows.items()
                if name.endswith(f": {end}") and not name.startswith("output")
            ]
            axes.scatter(*zip(*points, strict=True), marker=marker, color=colour, label=label)
        axes.set(title=panel, xlabel="computed steps of 28")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("PSNR against 28 computed steps, dB")
    figure.axes[0].legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chart", description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    draw(*read(args.table), args.out)


if __name__ == "__main__":
    main()
