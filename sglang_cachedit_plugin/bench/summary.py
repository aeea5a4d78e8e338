"""From records to figures: medians, ratios, efficiency, quality; and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from ..evaluation import quality
from .variants import STOCK, UNCACHED, Variant

Records = Sequence[Mapping[str, Any]]


def of_phase(records: Records, *phases: str) -> list[Mapping[str, Any]]:
    """Records of these phases that did not fail."""
    return [record for record in records if record["phase"] in phases and not record["error"]]


def medians(records: Records, field: str) -> dict[int, float]:
    """Median of a field over the repeats, by prompt; prompts without a value are left out."""
    values: dict[int, list[float]] = {}
    for record in of_phase(records, "timed"):
        if record.get(field) is not None:
            values.setdefault(record["prompt"], []).append(record[field])
    return {prompt: median(found) for prompt, found in values.items()}


def ratio(top: Mapping[int, float], bottom: Mapping[int, float]) -> float | None:
    """Sum over the prompts that both have, divided; None where there is none."""
    both = top.keys() & bottom.keys()
    below = sum(bottom[prompt] for prompt in both)
    return sum(top[prompt] for prompt in both) / below if below else None


def computed_steps(record: Mapping[str, Any], variant: Variant, steps: int, full_ms: float | None) -> int | None:
    """Computed steps of one request.

    Stock says nothing of them: there a step counts as computed that takes more than half of an uncached one.
    """
    if variant.kind == UNCACHED or record.get("enabled") is False:
        return steps
    if variant.kind != STOCK:
        return record.get("computed")
    times = record.get("steps_ms")
    if not times or full_ms is None or len(times) != steps:
        return None
    return sum(time > full_ms / 2 for time in times)


def efficiency(
    computed: Mapping[int, float], denoising: Mapping[int, float], uncached: Mapping[int, float], steps: int
) -> float | None:
    """Ideal denoising time, computed / all steps of the uncached time, by the measured one."""
    ideal = {prompt: computed[prompt] / steps * uncached[prompt] for prompt in computed.keys() & uncached.keys()}
    return ratio(ideal, denoising)


def summarise(
    variants: Sequence[Variant], records: Records, steps: int, pictures: Path, metrics: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """One row of figures for each variant; seconds are means over the prompts of medians over the repeats."""
    by_name = {variant.name: [r for r in records if r["variant"] == variant.name] for variant in variants}
    plain = next((by_name[variant.name] for variant in variants if variant.kind == UNCACHED), [])
    baseline = {field: medians(plain, field) for field in ("seconds", "denoising_s")}
    times = [time for record in of_phase(plain, "timed") for time in record.get("steps_ms") or ()]
    full_ms = median(times) if times else None
    rows = []
    for variant in variants:
        own = by_name[variant.name]
        for record in own:
            if not record["error"]:
                record["computed"] = computed_steps(record, variant, steps, full_ms)
        rows.append(_row(variant, own, baseline, steps) | _quality(variant, variants, own, pictures, metrics))
    return rows


def _row(
    variant: Variant, own: Records, baseline: Mapping[str, Mapping[int, float]], steps: int
) -> dict[str, Any]:
    seconds, denoising, computed = (medians(own, field) for field in ("seconds", "denoising_s", "computed"))
    first = next((record["seconds"] for record in of_phase(own, "first")), None)
    errors = [record["error"] for record in own if record["error"] and not record["phase"].startswith("switch")]
    later = mean(seconds.values()) if seconds else None
    return {
        "name": variant.name, "kind": variant.kind, "settings": dict(variant.settings),
        "left_out": list(variant.left_out),
        "requests": len(own), "failed": len(errors), "error": errors[0] if errors else None,
        "reason": None if variant.kind == UNCACHED else next(
            (record["reason"] for record in of_phase(own, "timed") if record.get("reason")), None
        ),
        "seconds": later,
        "denoising_s": mean(denoising.values()) if denoising else None,
        "computed": mean(computed.values()) if computed else None,
        "computed_is_estimated": variant.kind == STOCK,
        "speedup": ratio(baseline["seconds"], seconds),
        "denoising_speedup": ratio(baseline["denoising_s"], denoising),
        "efficiency": efficiency(computed, denoising, baseline["denoising_s"], steps),
        "peak_memory_mb": _most(own, "peak_memory_mb"), "peak_rss_mb": _most(own, "peak_rss_mb"),
        "first_request_s": first,
        "first_over_later": first / seconds[0] if first is not None and 0 in seconds else None,
        "switch": switch_cost(own),
    }


def _most(records: Records, field: str) -> float | None:
    return max((record[field] for record in records if record.get(field) is not None), default=None)


def switch_cost(own: Records) -> dict[str, Any] | None:
    """What a changed knob costs: the requests right after a change against the steady ones of the same prompt.

    ``cost_s`` compares whole requests, ``setup_cost_s`` only what denoising spends outside its steps: mounts and
    refreshes are there, and it does not vary with the steps.
    """
    tried = [record for record in own if record["phase"].startswith("switch")]
    if not tried:
        return None
    error = next((record["error"] for record in tried if record["error"]), None)
    after = [record for record in tried if not record["error"]]
    steady = [record for record in of_phase(own, "timed") if record["prompt"] == 0]
    costs = {}
    for name, field in (("cost_s", "seconds"), ("setup_cost_s", "setup_s")):
        sides = [[record[field] for record in side if record.get(field) is not None] for side in (after, steady)]
        costs[name] = median(sides[0]) - median(sides[1]) if all(sides) and error is None else None
    seconds = [record["seconds"] for record in steady]
    spread = max(seconds) - min(seconds) if len(seconds) > 1 else None
    return {**costs, "steady_spread_s": spread, "requests": len(tried), "error": error}


def _quality(
    variant: Variant, variants: Sequence[Variant], own: Records, pictures: Path, metrics: Sequence[str] | None
) -> dict[str, Any]:
    """Metrics of the variant's pictures against the uncached ones, over the prompts; None where there are none."""
    names = quality.available() if metrics is None else tuple(metrics)
    empty: dict[str, Any] = dict.fromkeys(quality.METRICS)
    plain = next((each for each in variants if each.kind == UNCACHED), None)
    if plain is None or variant is plain:
        return empty
    scores: dict[str, list[float]] = {name: [] for name in names}
    for prompt in sorted({record["prompt"] for record in of_phase(own, "timed")}):
        paths = [pictures / f"{name}-{prompt}.npy" for name in (plain.name, variant.name)]
        if not all(path.exists() for path in paths):
            continue
        reference, picture = (np.load(path, allow_pickle=False) for path in paths)
        for name in names:
            scores[name].append(float(np.mean(quality.by_frame(name, reference, picture))))
    return empty | {name: quality.summary(values, name) for name, values in scores.items() if values}


COLUMNS = (
    "variant", "s/output", "denoise s", "computed", "speed-up", "of ideal", "PSNR", "worst", "SSIM", "FLIP", "MiB",
    "first s", "switch ms", "setup ms",
)


def _number(value: float | None, digits: int, suffix: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{suffix}"


def cells(row: Mapping[str, Any]) -> list[str]:
    """One line of the table."""
    psnr, ssim, flip = (row.get(name) or {} for name in quality.METRICS)
    switch = row["switch"] or {}
    cost, setup = switch.get("cost_s"), switch.get("setup_cost_s")
    about = "~" if row["computed_is_estimated"] and row["computed"] is not None else ""
    return [
        row["name"], _number(row["seconds"], 3), _number(row["denoising_s"], 3),
        about + _number(row["computed"], 1), _number(row["speedup"], 2, "x"),
        _number(None if row["efficiency"] is None else 100 * row["efficiency"], 1, "%"),
        _number(psnr.get("mean"), 1), _number(psnr.get("min"), 1), _number(ssim.get("mean"), 3),
        _number(flip.get("mean"), 3), _number(row["peak_memory_mb"] or row["peak_rss_mb"], 0),
        _number(row["first_request_s"], 2),
        "failed" if switch.get("error") else _number(None if cost is None else 1000 * cost, 0),
        _number(None if setup is None else 1000 * setup, 1),
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, and below it what failed, was limited or was left out."""
    lines = [list(COLUMNS), *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    out = []
    for name, *rest in lines:
        right = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        out.append("  ".join([name.ljust(widths[0]), *right]))
    for row in rows:
        if row["failed"]:
            out.append(f"{row['name']}: {row['failed']} of {row['requests']} requests failed: {row['error']}")
        if (row["switch"] or {}).get("error"):
            out.append(f"{row['name']}: failed after a changed knob: {row['switch']['error']}")
        if row["reason"]:
            out.append(f"{row['name']}: {row['reason']}")
        if (row["efficiency"] or 0.0) > 1.0:
            out.append(f"{row['name']}: warning: above 100 % of ideal, so something else ran beside these: repeat them")
        if row["left_out"]:
            out.append(f"{row['name']}: stock has no {', '.join(row['left_out'])}")
    return "\n".join(out)
