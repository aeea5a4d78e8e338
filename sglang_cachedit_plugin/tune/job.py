"""One tuning run: every grid, its held-out figures, the chosen points."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import CacheDitError
from ..evaluation.host_process import HostError
from . import candidates, search, selection
from .candidates import Candidate
from .evaluate import Evaluator, Grid, Prompt
from .promise import TOLERANCES, Promise, largest
from .refine import RESIDUAL_LEAD, Say, Tuner
from .selection import Point
from .surrogate import Mask

BASELINES = {"none": (), "plain": ("growing",), "all": ("",)}
"""Beginnings of names of what else is measured beside fewer steps."""
REFINEMENTS = 4
RECORDED = 12
"""Trajectories from which DPCache's planner works."""
CHUNK = 8
"""Calibration prompts after which a tolerance that has failed is given up."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked for.

    Args:
        target: ``min_psnr``, ``min_ssim``, ``speedup`` or ``budget`` with its value.
        baselines: beginnings of the names of what else is measured.
        shares: parts of the steps that are computed in the named profiles.
        evaluations: trials in the host for each budget.
        promise: how many unseen prompts shall reach the target; no search then, ``tune`` is the calibration set.
    """

    grids: Sequence[Grid]
    tune: Sequence[Prompt]
    heldout: Sequence[Prompt]
    target: Mapping[str, float]
    seed: int
    evaluations: int
    baselines: Sequence[str]
    shares: Sequence[float]
    promise: Promise | None = None


@dataclass
class Result:
    """One grid's outcome.

    Args:
        profiles: profile name -> point that serves it.
        rows: point name -> its row of the config file.
        knobs: point name -> the settings beside the row.
        promise: see ``_calibrate``.
    """

    grid: Grid
    points: list[Point] = field(default_factory=list)
    rows: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    knobs: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    profiles: dict[str, Point] = field(default_factory=dict)
    chosen: Point | None = None
    remarks: list[str] = field(default_factory=list)
    promise: dict[str, Any] | None = None
    step_seconds: dict[str, float] = field(default_factory=dict)
    methods: list[dict[str, Any]] = field(default_factory=list)


def others(steps: int, budgets: Sequence[int], plan: Callable[[int], Mask] | None) -> list[Candidate]:
    """What can be measured beside schedules tuned for ``budgets`` computed steps.

    Args:
        plan: the schedule of DPCache's planner for a budget.
    """
    beside = {round(steps * share) for share in (0.7, 0.85)}
    found = [candidates.fewer_steps(budget) for budget in sorted(beside | set(budgets))]
    for budget in budgets:
        found += candidates.growing(steps, budget)
        found += [candidates.planned(plan(budget))] if plan is not None else []
    return [*found, *candidates.stock(steps), *candidates.built_in(), *candidates.host_caches(steps)]


def run(plan: Plan, evaluator: Evaluator, say: Say) -> list[Result]:
    """Tune every grid."""
    return [_Grid(plan, evaluator, grid, say).run() for grid in plan.grids]


class _Grid:
    def __init__(self, plan: Plan, evaluator: Evaluator, grid: Grid, say: Say):
        self.plan, self.evaluator, self.grid, self.say = plan, evaluator, grid, say
        self.result, self._residual = Result(grid=grid), False

    def run(self) -> Result:
        """Budgets, held-out figures, the choice."""
        if self.plan.promise is not None:
            self._calibrate(self.plan.promise)
        else:
            self._search()
        uncached = [each["denoising_s"] for each in self.evaluator.references(self.plan.heldout, self.grid)]
        self.result.step_seconds = {"computed": float(np.median(uncached)) / self.grid.steps}
        return self.result

    def _calibrate(self, promise: Promise) -> None:
        """The largest tolerance that keeps the promise, its point, and what was shown with how many prompts."""
        plan, metric = self.plan, self._metric
        least, count = plan.target[f"min_{metric}"], len(plan.tune)

        def missing(value: float, allowed: int) -> int:
            self.say(f"{self.grid.label}: error tolerance {value:g} on {count} calibration prompts")
            request, missed = candidates.tolerance(value).request, 0
            for first in range(0, count, CHUNK):
                prompts = plan.tune[first : first + CHUNK]
                each = self.evaluator.measure_all(prompts, self.grid, request, pictures=True)
                missed += sum(figures[metric] < least for figures in each)
                if missed > allowed:
                    break
            return missed

        found = largest(TOLERANCES, missing, count, promise)
        if found is None:
            raise CacheDitError(
                f"{metric.upper()} {least:g} cannot be shown for {promise.share:.1%} of prompts even with error "
                f"tolerance {TOLERANCES[0]:g}, the smallest that is tried: ask for less"
            )
        candidate = candidates.tolerance(found[0], "tuned")
        self._verify(candidate)
        self.result.chosen = point = self.result.points[-1]
        self.result.knobs[candidate.name] = candidate.knobs
        self.result.promise = {
            "metric": metric, "least": least, "share": promise.share, "confidence": promise.confidence,
            "prompts": count, "missing": found[1], "bound": promise.bound(found[1], count),
            "heldout": len(plan.heldout), "heldout_missing": sum(value < least for value in point[metric]["each"]),
        }
        for baseline in self._others([round(point["computed"])]):
            self._verify(baseline)

    def _search(self) -> None:
        self.tuner = Tuner(
            self.evaluator, self.grid, self.plan.tune, seed=self.plan.seed, evaluations=self.plan.evaluations,
            say=self.say, alone=len(self.plan.grids) == 1,
        )
        shares = self._budgets()
        self._compare_methods(sorted(shares.values())[len(shares) // 2])
        # From many computed steps to few; each budget stands for itself, so that a run can be resumed anywhere.
        for budget in sorted(set(shares.values()), reverse=True):
            self._add_tuned(budget)
        for candidate in self._others(sorted(set(shares.values()))):
            self._verify(candidate)
        self._choose()
        self.result.profiles = {name: self._point(f"tuned-{budget}") for name, budget in shares.items()}

    def _budgets(self) -> dict[str, int]:
        least = len(self.tuner.starts)
        shares = {
            f"tuned-{round(100 * share)}": max(least, round(share * self.grid.steps)) for share in self.plan.shares
        }
        target = self.plan.target
        if target.get("budget"):
            shares["chosen"] = int(target["budget"])
        elif target.get("speedup"):
            shares["chosen"] = max(least, int(self.grid.steps / target["speedup"]))
        return shares

    def _compare_methods(self, budget: int) -> None:
        tried = self.tuner.compare_methods(budget)
        self.say(f"{self.grid.label}: the same schedule with the residual forecast")
        residual = self.tuner.residual_variants(tried[0])
        self.result.methods = [
            {"method": f"output, {t.method.name}", "score": t.score, "computed": budget, "prompts": len(t.decibels)}
            for t in tried
        ] + [
            {"method": candidate.label, "score": value, "computed": budget, "prompts": count}
            for candidate, value, count in residual
        ]
        winner = max(residual, key=lambda each: each[1])
        self._residual = winner[1] > tried[0].score + RESIDUAL_LEAD
        if self._residual and len(self.plan.grids) > 1:
            self.result.remarks.append(
                f"on tuning prompts {winner[0].label} was better than any forecast of the output at {budget} steps; "
                "one file for several grids forecasts the output, tune this one alone"
            )
            self._residual = False

    def _add_tuned(self, budget: int) -> None:
        best = self.tuner.tune(budget)
        candidate = self.tuner.candidate(best, f"tuned-{budget}")
        if self._residual:
            found, value, _ = max(self.tuner.residual_variants(best), key=lambda each: each[1])
            if value > best.score + RESIDUAL_LEAD:
                candidate = replace(found, name=candidate.name, label=f"{candidate.label}, {found.label}")
        self.result.rows[candidate.name] = candidate.row or {}
        self.result.knobs[candidate.name] = candidate.knobs
        self._verify(candidate)
        if self._metric is not None:
            # Held-out prompts have no say in what is chosen.
            each = self.evaluator.measure_all(self.plan.tune, self.grid, candidate.request, pictures=True)
            self.result.points[-1]["tuning"] = {self._metric: float(np.mean([f[self._metric] for f in each]))}
        self._add_control(budget)

    def _add_control(self, budget: int) -> None:
        """Error control with as many computed steps on the tuning prompts: what a schedule must beat."""
        def computed(value: float) -> float:
            request = candidates.tolerance(value).request
            each = self.evaluator.measure_all(self.plan.tune, self.grid, request, pictures=False)
            return float(np.mean([figures["computed"] for figures in each]))

        self.say(f"{self.grid.label}: error control with {budget} computed steps")
        at = bisect.bisect_left(TOLERANCES, True, key=lambda value: computed(value) <= budget)
        if at < len(TOLERANCES):
            candidate = candidates.tolerance(TOLERANCES[at])
            if candidate.name not in [point["name"] for point in self.result.points]:
                self._verify(candidate)

    @property
    def _metric(self) -> str | None:
        """The metric of which the target names the least."""
        return next((name for name in ("psnr", "ssim") if f"min_{name}" in self.plan.target), None)

    def _verify(self, candidate: Candidate) -> None:
        self.say(f"{self.grid.label}: {candidate.label} on {len(self.plan.heldout)} held-out prompts")
        try:
            point = selection.verify(self.evaluator, self.grid, self.plan.heldout, candidate)
        except HostError:
            if candidate.kind != "host":
                raise
            point = None
        if point is None:
            self.result.remarks.append(f"{candidate.label}: the model does not have it")
        else:
            self.result.points.append(point)

    def _others(self, budgets: Sequence[int]) -> list[Candidate]:
        named = any("dpcache".startswith(word) or word.startswith("dpcache") for word in self.plan.baselines)
        found = others(self.grid.steps, budgets, self._planned if named else None)
        return [each for each in found if each.name.startswith(("fewer-", *self.plan.baselines))]

    def _planned(self, budget: int) -> Mask:
        recorded = self.evaluator.trajectories(self.plan.tune[:RECORDED], self.grid)
        return search.dpcache(recorded, max(budget, len(recorded.starts)))

    def _choose(self) -> None:
        point, remark = selection.choose(self.result.points, self.grid.steps, self.plan.target)
        metric = self._metric
        for _ in range(REFINEMENTS if metric else 0):
            budget = self._between(metric)
            if budget is None:
                break
            self._add_tuned(budget)
            self._verify(candidates.fewer_steps(budget))
            point, remark = selection.choose(self.result.points, self.grid.steps, self.plan.target)
        self.result.chosen = point
        if remark:
            self.result.remarks.append(remark)
        elif metric and point[metric]["mean"] < self.plan.target[f"min_{metric}"]:
            self.result.remarks.append(
                f"{point['label']} reaches the target on the {len(self.plan.tune)} tuning prompts and misses it on the "
                f"{len(self.plan.heldout)} held-out ones: tune on more prompts, or ask for more"
            )

    def _between(self, metric: str) -> int | None:
        """A budget between the cheapest that meets the target and the next that does not; above all if none does."""
        least = self.plan.target[f"min_{metric}"]
        tuned = [p for p in self.result.points if p["kind"] == "tuned"]
        good = min((round(p["computed"]) for p in tuned if p["tuning"][metric] >= least), default=self.grid.steps)
        failed = [round(p["computed"]) for p in tuned if p["tuning"][metric] < least]
        bad = max((computed for computed in failed if computed < good), default=1)
        middle = (good + bad) // 2
        return middle if bad < middle < good else None

    def _point(self, name: str) -> Point:
        return next(point for point in self.result.points if point["name"] == name)
