"""Held-out figures of every candidate, which of them is chosen, and who wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..evaluation import quality
from .candidates import CONTROL, Candidate
from .evaluate import SHEET, Evaluator, Grid, Prompt

Point = dict[str, Any]
CACHE_KINDS = ("tuned", "growing_window", "baseline")
"""Kinds that a config file can hold."""
CONTROL_STEPS = 0.5
"""Mean computed steps more that count as equal: how many error control computes hangs on the prompts."""


def verify(evaluator: Evaluator, grid: Grid, prompts: Sequence[Prompt], candidate: Candidate) -> Point | None:
    """The candidate's point of the report, None where the model does not know what it asks for."""
    def figures_of(some: Sequence[Prompt]) -> list[dict[str, Any]]:
        return evaluator.measure_all(
            some, grid, candidate.request, pictures=True, keep=SHEET, steps=candidate.steps
        )

    # A host's cache that the model lacks costs one request.
    if candidate.kind == "host" and figures_of(prompts[:1])[0]["latent_psnr"] >= quality.IDENTICAL_PSNR:
        return None
    each = figures_of(prompts)
    latents = [figures["latent_psnr"] for figures in each]
    uncached = [reference["denoising_s"] for reference in evaluator.references(prompts, grid)]
    spent = [figures["denoising_s"] for figures in each]
    computed = candidate.computed
    if computed is None:
        known = [figures["computed"] for figures in each]
        computed = float(np.mean(known)) if max(known) else grid.steps * float(np.sum(spent) / np.sum(uncached))
    return {
        "name": candidate.name, "kind": candidate.kind, "label": candidate.label, "family": candidate.family,
        "settings": dict(candidate.settings or {}), "computed": computed,
        "speedup": float(np.median(uncached) / np.median(spent)),
        "psnr": quality.summary([figures["psnr"] for figures in each]),
        **({"ssim": quality.summary([f["ssim"] for f in each], "ssim")} if "ssim" in each[0] else {}),
        "latent_psnr": quality.summary(latents), "mask": _lists(candidate.mask),
        "step_errors": candidate.drift and list(candidate.drift),
    }


def _lists(mask: Any) -> Any:
    if isinstance(mask, Mapping):
        return {branch: list(each) for branch, each in mask.items()}
    return mask and list(mask)


def rivals(points: Sequence[Point], computed: float) -> list[Point]:
    """Everything but tuned schedules that computes at most so many steps."""
    return [point for point in points if point["kind"] != "tuned" and point["computed"] <= computed + 1e-6]


def needed(points: Sequence[Point], decibels: float) -> tuple[float, Point] | None:
    """Fewest computed steps at which any rival reaches ``decibels``, and which.

    Points of one family lie on a line; a family counts from its first point that reaches them, interpolated
    towards the point before.
    """
    found = []
    families: dict[str, list[Point]] = {}
    for point in points:
        if point["kind"] != "tuned":
            families.setdefault(point.get("family") or point["name"], []).append(point)
    for family in families.values():
        family.sort(key=lambda point: point["computed"])
        for before, point in zip([None, *family], family, strict=False):
            if point["psnr"]["mean"] < decibels:
                continue
            at = point["computed"]
            if before is not None and before["psnr"]["mean"] < decibels < point["psnr"]["mean"]:
                part = (decibels - before["psnr"]["mean"]) / (point["psnr"]["mean"] - before["psnr"]["mean"])
                at = before["computed"] + part * (point["computed"] - before["computed"])
            found.append((at, point))
            break
    return min(found, key=lambda each: each[0], default=None)


def describe(points: Sequence[Point], tuned: Point) -> str:
    """Whether a tuned schedule wins on held-out prompts, with figures."""
    words = f"{tuned['label']}: {_scores(tuned)}"
    if (rival := better(points, tuned)) is not None:
        return f"{words}. It does not win: {rival['label']} ({rival['computed']:.1f} computed) {_scores(rival)}."
    best = max(rivals(points, tuned["computed"]), key=lambda point: point["psnr"]["mean"], default=None)
    if best is None:
        return f"{words}; nothing else was measured at as few computed steps."
    words += (f". The best other at no more computed steps: {best['label']} ({best['computed']:.1f} computed) "
              f"{_scores(best)}")
    reach = needed(points, tuned["psnr"]["mean"])
    if reach is None:
        return f"{words}; no other measured point reaches {tuned['psnr']['mean']:.1f} dB."
    saved = 100.0 * (1.0 - tuned["computed"] / reach[0])
    at = f"{reach[1]['label']} at {reach[0]:.1f} computed ({saved:.0f} % saved)"
    return f"{words}; the first other to reach {tuned['psnr']['mean']:.1f} dB is {at}."


def _scores(point: Point) -> str:
    psnr = point["psnr"]
    return f"{psnr['mean']:.1f} dB mean, {psnr['p10']:.1f} 10th percentile, {psnr['min']:.1f} worst"


def better(points: Sequence[Point], tuned: Point) -> Point | None:
    """The rival that beats a tuned schedule at no more computed steps, None where it wins.

    Error control, which needs no tuning, beats it with a higher mean or 10th percentile at about as many steps, any
    other rival with a higher mean.
    """
    least, most = tuned["psnr"], tuned["computed"] + 1e-6
    found = []
    for point in points:
        control = point.get("family") == CONTROL
        ahead = point["psnr"]["mean"] > least["mean"] or (control and point["psnr"]["p10"] > least["p10"])
        if point["kind"] != "tuned" and ahead and point["computed"] <= most + CONTROL_STEPS * control:
            found.append(point)
    return max(found, key=lambda point: point["psnr"]["mean"], default=None)


def choose(points: Sequence[Point], steps: int, target: Mapping[str, float | None]) -> tuple[Point, str | None]:
    """The tuned point that meets the target with the fewest computed steps, and a remark where none does.

    A least quality is looked for on the tuning prompts: held-out prompts only report.

    Args:
        target: one of ``min_psnr``, ``min_ssim``, ``speedup``, ``budget`` with its value.
    """
    tuned = sorted((point for point in points if point["kind"] == "tuned"), key=lambda point: point["computed"])
    for metric in ("psnr", "ssim"):
        if (least := target.get(f"min_{metric}")) is not None:
            for point in tuned:
                if point["tuning"][metric] >= least:
                    return point, None
            return tuned[-1], f"no schedule that was tried reaches {metric.upper()} {least:g} on tuning prompts"
    most = float(target["budget"]) if target.get("budget") else steps / float(target["speedup"])
    fitting = [point for point in tuned if point["computed"] <= most + 1e-6]
    if not fitting:
        return tuned[0], f"no schedule that was tried computes at most {most:g} steps"
    return fitting[-1], None
