"""A request's report as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .stats import percentile

RANKS = (0, 25, 50, 75, 95, 100)
_HEAD = ("transformer", "branch", "computed", "cached", "P00", "P25", "P50", "P75", "P95", "max")
_TEXT_COLUMNS = 2


def rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row for each transformer and branch: steps, and percentiles of its measured residual differences."""
    found = []
    for name, transformer in report["transformers"].items():
        for branch, steps in transformer["branches"].items():
            diffs = sorted(steps["residual_diffs"].values())
            cells = [f"{percentile(diffs, rank):.3f}" if diffs else "-" for rank in RANKS]
            found.append((name, branch, str(len(steps["computed"])), str(len(steps["cached"])), *cells))
    return found


def lines(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of one request; outputs that ran one by one follow each other. Empty where nothing was cached."""
    body = [row for report in reports for row in rows(report)]
    if not body:
        return []
    correctors = [report["corrector"] for report in reports if report["corrector"] is not None]
    aligned = align([_HEAD, *body], text_columns=_TEXT_COLUMNS)
    return [aligned[0], "-" * len(aligned[0]), *aligned[1:], *_corrected(correctors)]


def _corrected(correctors: Sequence[Mapping[str, Any]]) -> list[str]:
    steps = sum(each["corrected_steps"] for each in correctors)
    sizes = [each["largest_correction"] for each in correctors if each["largest_correction"] is not None]
    return [f"corrected {steps} cached steps, largest {max(sizes):.2f}"] if sizes else []


def align(table: Sequence[Sequence[str]], text_columns: int) -> list[str]:
    """Cells under each other: the first ``text_columns`` to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    out = []
    for row in table:
        cells = [
            cell.ljust(width) if index < text_columns else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        out.append("  ".join(cells).rstrip())
    return out
