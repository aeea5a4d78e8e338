"""What is tried: tuned schedules as requests, and the baselines beside which they are measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config.sources import PROFILES
from .evaluate import OFF
from .search import growing_window
from .surrogate import Mask, Method

CONTROL = "error control"
"""The family of settings that name an error tolerance."""
STATIC = {"steps_computation_policy": "static", "max_warmup_steps": 0}
OUTPUT = {"forecast": "output", **STATIC}
RESIDUAL: Mapping[str, Mapping[str, Any]] = {
    "last residual": {},
    "TaylorSeer 1": {"enable_taylorseer": True, "taylorseer_order": 1},
    "TaylorSeer 2": {"enable_taylorseer": True, "taylorseer_order": 2},
    "DMD": {"enable_dmd": True},
    "TaylorSeer 1, F 2": {"enable_taylorseer": True, "taylorseer_order": 1, "Fn_compute_blocks": 2},
}
"""Ways to forecast the blocks' residual, in which a schedule is tried beside forecasts of the output."""


@dataclass(frozen=True)
class Candidate:
    """One way to serve a request, as a point of the report.

    Args:
        kind: tuned, fewer_steps, growing_window, baseline or host.
        request: sampling parameters.
        settings: the same as ``cache_config``, where it is one.
        steps: steps of the request, where they are fewer than the grid's.
        computed: computed steps where the host's report does not say.
        family: points that belong on one line.
        mask: computed steps as 1; by CFG branch where each has its own.
        row: the schedule's row of the config file, ``knobs`` the settings beside it.
    """

    name: str
    kind: str
    label: str
    request: Mapping[str, Any]
    settings: Mapping[str, Any] | None = None
    steps: int | None = None
    computed: float | None = None
    family: str | None = None
    mask: Mask | Mapping[str, Mask] | None = None
    method: Method | None = None
    drift: tuple[float, ...] | None = None
    row: Mapping[str, Any] | None = None

    @property
    def knobs(self) -> dict[str, Any]:
        """The settings without the schedule's row."""
        return {name: value for name, value in (self.settings or {}).items() if name != "schedules"}


def cached(name: str, kind: str, label: str, settings: Mapping[str, Any], **more: Any) -> Candidate:
    """A candidate that the plugin serves."""
    request = {"enable_cache_dit": True, "cache_dit_params": dict(settings)}
    return Candidate(name=name, kind=kind, label=label, request=request, settings=dict(settings), **more)


def row(
    steps: int, size: tuple[int, ...], timesteps: Any, masks: Sequence[Mask], method: Method, weights: Any
) -> dict[str, Any]:
    """A schedule's row as the config file carries it.

    Args:
        masks: one for all CFG branches, or the conditional and the unconditional one.
    """
    found = {**bare_row(steps, size, masks), "order": method.order}
    if method.damping != 1.0:
        found["damping"] = method.damping
    if method.fitted:
        found["weights"] = [[round(weight, 5) for weight in each] for each in weights]
        found["timesteps"] = [round(float(place), 4) for place in timesteps]
    return found


def bare_row(steps: int, size: tuple[int, ...], masks: Sequence[Mask]) -> dict[str, Any]:
    """A row that says only which steps are computed."""
    texts = ["".join(map(str, mask)) for mask in masks]
    found: dict[str, Any] = {"steps": steps, "size": "x".join(map(str, size)), "mask": texts[0]}
    if texts[-1] != texts[0]:
        found["uncond_mask"] = texts[-1]
    return found


def fewer_steps(steps: int) -> Candidate:
    """The plain baseline: the same picture in fewer steps, nothing cached."""
    return Candidate(
        name=f"fewer-{steps}", kind="fewer_steps", label=f"{steps} steps, no cache", request=OFF, steps=steps,
        computed=float(steps), family="fewer steps",
    )


def tolerance(value: float, kind: str = "baseline") -> Candidate:
    """Error control, which chooses the steps of each prompt."""
    return cached(f"tolerance-{value:g}", kind, f"error tolerance {value:g}", {"error_tolerance": value},
                  family=CONTROL)


def growing(steps: int, budget: int) -> list[Candidate]:
    """Gaps that grow with the step; the last residual, or a linear forecast of the output."""
    mask = growing_window(steps, budget)
    shared = {**STATIC, "steps_computation_mask": list(mask)}
    output = {**shared, "forecast": "output", "forecast_order": 1}
    return [
        cached(f"growing-{budget}", "growing_window", f"growing window {budget}, last residual", shared,
               family="growing window", mask=mask),
        cached(f"growing-output-{budget}", "growing_window", f"growing window {budget}, linear forecast", output,
               family="growing window, linear forecast", mask=mask),
    ]


def planned(mask: Mask) -> Candidate:
    """DPCache: its planner's schedule with linear forecasts, as published: nothing is corrected."""
    settings = {**OUTPUT, "steps_computation_mask": list(mask), "forecast_order": 1, "corrector": False}
    return cached(f"dpcache-{sum(mask)}", "baseline", f"DPCache planner, {sum(mask)} computed", settings,
                  family="DPCache planner", mask=mask)


def every(steps: int, interval: int) -> list[int]:
    """Every ``interval``-th step computed after three to begin with: the masks of TaylorSeer's authors."""
    return [int(step < 3 or (step - 2) % interval == 0) for step in range(steps)]


def stock(steps: int) -> list[Candidate]:
    """What Cache-DiT offers: thresholds, presets, calibrators."""
    found = [
        cached(f"dbcache-{value:g}", "baseline", f"DBCache, threshold {value:g}", {"residual_diff_threshold": value},
               family="DBCache")
        for value in (0.08, 0.12, 0.24)
    ]
    settings: dict[str, Any] = {"residual_diff_threshold": 0.4, "max_continuous_cached_steps": -1}
    found.append(cached("dbcache-0.4-long", "baseline", "DBCache, threshold 0.4, runs of any length", settings,
                        family="DBCache"))
    for policy, presets in (("static", ("medium", "fast", "ultra")), ("dynamic", ("fast",))):
        for preset in presets:
            settings = {"steps_computation_mask": preset, "steps_computation_policy": policy}
            found.append(cached(f"scm-{preset}-{policy}", "baseline", f"SCM {preset}, {policy}", settings,
                                family=f"SCM {policy}"))
    for name, label, settings, presets, intervals in (
        ("taylorseer-1", "TaylorSeer 1", {"enable_taylorseer": True, "taylorseer_order": 1},
         ("medium", "fast", "ultra"), (2, 3)),
        ("dmd", "DMD", {"enable_dmd": True}, ("fast",), (2,)),
    ):
        found.append(cached(name, "baseline", f"{label}, threshold 0.24", settings, family=label))
        for preset in presets:
            fixed = {**settings, "steps_computation_mask": preset, "steps_computation_policy": "static"}
            found.append(cached(f"{name}-{preset}", "baseline", f"{label}, SCM {preset}, static", fixed,
                                family=f"{label}, SCM"))
        for interval in intervals:
            fixed = {**settings, **STATIC, "steps_computation_mask": every(steps, interval)}
            found.append(cached(f"{name}-every-{interval}", "baseline", f"{label}, every {_nth(interval)} step", fixed,
                                family=f"{label}, even"))
    return found


def built_in() -> list[Candidate]:
    """The profiles that every server knows."""
    return [
        cached(f"profile-{name}", "baseline", f"built-in profile {name}", knobs, family=CONTROL)
        for name, knobs in PROFILES.items()
    ]


def _nth(interval: int) -> str:
    return {2: "second", 3: "third"}[interval]


def host_caches(steps: int) -> list[Candidate]:
    """The host's own caches; models without them answer with the uncached picture."""
    found = [Candidate(name="teacache", kind="host", label="TeaCache", request={**OFF, "enable_teacache": True})]
    for window, flex in ((2.0, 0.25), (2.0, 0.75), (2.0, 3.0)):
        params = {"window_size": window, "flex_window": flex, "warmup_steps": 5}
        found.append(Candidate(
            name=f"spectrum-{flex:g}", kind="host", label=f"Spectrum, flex {flex:g}", family="Spectrum",
            request={**OFF, "enable_spectrum": True, "spectrum_params": params},
            computed=float(spectrum_computed(steps, window, flex, 5)),
        ))
    return found


def spectrum_computed(steps: int, window: float, flex: float, warmup: int) -> int:
    """Steps that the host's Spectrum computes (``runtime/cache/spectrum.py``, ``begin_spectrum_step``)."""
    computed = consecutive = 0
    for step in range(steps):
        real = True
        if step >= warmup:
            real = (consecutive + 1) % max(1, math.floor(window)) == 0
            if real:
                window = round(window + flex, 3)
        computed += real
        consecutive = 0 if real else consecutive + 1
    return computed
