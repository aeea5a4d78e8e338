"""Every setting of the cache: type, range, unit, default and what it does.

The knobs of DBCache, TaylorSeer and DMD keep the names of cache-dit
(``cache_dit.DBCacheConfig``, ``TaylorSeerCalibratorConfig``, ``DMDCalibratorConfig``);
defaults are those of SGLang's environment variables, the same on both backends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .knobs import Bins, Choice, Flag, Knob, Mask, Number, Whole, declared, setting
from .tuned_schedules import Rows, TunedSchedule


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """The settings in force for one transformer during one request."""

    Fn_compute_blocks: int = setting(Whole(
        "First blocks that run on every step; their residual is compared.", unit="blocks", low=1, env="FN"
    ), 1)
    Bn_compute_blocks: int = setting(Whole("Last blocks that run on every step.", unit="blocks", low=0, env="BN"), 0)
    max_warmup_steps: int = setting(Whole(
        "Steps computed before caching starts.", unit="steps", low=0, env="WARMUP"
    ), 4)
    warmup_interval: int = setting(Whole(
        "Within the warmup only every n-th step must be computed.", unit="steps", low=1
    ), 1)
    residual_diff_threshold: float = setting(Number(
        "Relative L1 difference of the first blocks' residual under which a step is cached: 0 never, 1 always.",
        low=0.0, high=1.0, env="RDT",
    ), 0.24)
    max_accumulated_residual_diff_threshold: float | None = setting(Number(
        "Sum of all differences after which nothing more is cached.", low=0.0, optional=True
    ), None)
    max_cached_steps: int = setting(Whole("Most cached steps of a request; -1: no limit.", unit="steps", low=-1), -1)
    max_continuous_cached_steps: int = setting(Whole(
        "Most cached steps in a row; -1: no limit.", unit="steps", low=-1, env="MC"
    ), 3)
    enable_taylorseer: bool = setting(Flag(
        "Forecast the residual with a Taylor expansion (arXiv 2503.06923).", env="TAYLORSEER"
    ), False)
    taylorseer_order: int = setting(Whole("Order of the Taylor expansion.", low=1, high=2, env="TS_ORDER"), 1)
    enable_dmd: bool = setting(Flag(
        "Forecast the residual with dynamic mode decomposition; excludes TaylorSeer.", env="DMD"
    ), False)
    dmd_history: int = setting(Whole(
        "Computed steps that the decomposition looks back on.", unit="steps", low=2, high=64, env="DMD_HISTORY"
    ), 6)
    dmd_rank: int = setting(Whole(
        "Rank kept of the decomposition; 0: chosen from the spectrum.", low=0, high=64, env="DMD_RANK"
    ), 0)
    dmd_ridge: float = setting(Number(
        "Tikhonov term added to the singular values.", low=0.0, high=1.0, env="DMD_RIDGE"
    ), 1e-8)
    dmd_svd_precision: str = setting(Choice(
        "Precision of the sums that the decomposition is made from: low float32, medium and high float64.",
        choices=("low", "medium", "high"), env="DMD_SVD_PRECISION",
    ), "medium")
    num_inference_steps: int | None = setting(Whole(
        "Steps that bins or a mask list were written for.", unit="steps", low=1, optional=True, per_transformer=False
    ), None)
    steps_computation_mask: str | tuple[int, ...] | None = setting(Mask(
        "Schedule: a preset or one entry a step, 1 computed and 0 may be cached.", optional=True, env="SCM_PRESET"
    ), None)
    scm_compute_bins: tuple[int, ...] | None = setting(Bins(
        "Schedule as bins: lengths of the computed runs.", unit="steps", optional=True, env="SCM_COMPUTE_BINS"
    ), None)
    scm_cache_bins: tuple[int, ...] | None = setting(Bins(
        "Schedule as bins: lengths of the cached runs between them.", unit="steps", optional=True, env="SCM_CACHE_BINS"
    ), None)
    schedules: tuple[TunedSchedule, ...] | None = setting(Rows(
        "Tuned schedules for numbers of steps and sizes; others are resampled from the nearest.", optional=True
    ), None)
    steps_computation_policy: str = setting(Choice(
        "Steps that a schedule marks 0: dynamic asks the threshold, static always caches.",
        choices=("dynamic", "static"), env="SCM_POLICY",
    ), "dynamic")
    cfg_diff_compute_separate: bool = setting(Flag(
        "Measure the difference for each CFG branch; false: the other branches follow cond.", per_transformer=False
    ), True)
    lockstep: bool = setting(Flag(
        "Under CFG parallelism both ranks compute if either must.", env="LOCKSTEP", per_transformer=False
    ), False)
    verify_ranks: bool = setting(Flag(
        "Compare the decisions of all ranks on every step and stop if they differ.", env="VERIFY_RANKS",
        per_transformer=False,
    ), False)
    forecast: str = setting(Choice(
        "What is forecast on a cached step: the blocks' residual, or the whole model output (nothing of the "
        "transformer runs).", choices=("residual", "output"), env="FORECAST",
    ), "residual")
    forecast_order: int = setting(Whole(
        "Order of the extrapolation of the model output.", low=1, high=3, env="FORECAST_ORDER"
    ), 1)
    forecast_damping: float = setting(Number(
        "What each order of that extrapolation counts, in powers: 1 the whole polynomial, 0 the last output.",
        low=0.0, high=1.0, env="FORECAST_DAMPING",
    ), 1.0)
    error_tolerance: float | None = setting(Number(
        "Error of the model output that cached steps may pass on, relative to the output: chooses the steps of each "
        "request from the error of its own forecasts. 0 computes every step.",
        low=0.0, high=1.0, optional=True, env="ERROR_TOLERANCE", per_transformer=False,
    ), None)
    corrector: bool = setting(Flag(
        "Set cached steps right when the next output is computed: the scheduler goes back and repeats them. No "
        "evaluation of the model.", env="CORRECTOR", per_transformer=False,
    ), True)
    corrector_order: int = setting(Whole(
        "Degree of the polynomial through the computed outputs that corrects cached steps.",
        low=1, high=2, env="CORRECTOR_ORDER", per_transformer=False,
    ), 2)
    corrector_carry: float | None = setting(Number(
        "How far a computed output follows its corrected latents: 1 keeps the predicted clean latents, 0 the output. "
        "Unset: 0.75 under an error tolerance, otherwise 0.5.",
        low=0.0, high=1.0, optional=True, env="CORRECTOR_CARRY", per_transformer=False,
    ), None)
    strict: bool = setting(Flag(
        "Refuse what cannot be cached as asked, instead of going on uncached: 400 on a server.", env="STRICT",
        per_transformer=False,
    ), False)

    @property
    def calibrator(self) -> str | None:
        """The forecast of the residual: ``taylorseer``, ``dmd`` or None (the last residual is reused)."""
        if self.enable_taylorseer:
            return "taylorseer"
        return "dmd" if self.enable_dmd else None


KNOBS: Mapping[str, Knob] = declared(CacheSettings)

ALIASES: Mapping[str, str] = {
    "scm_preset": "steps_computation_mask",
    "scm_policy": "steps_computation_policy",
}
"""Other spellings of a setting, as requests and variables write it."""
MISSPELT: Mapping[str, str] = {"enable_sperate_cfg": "enable_separate_cfg"}
"""A spelling of SGLang's documentation, read with a warning."""

SCHEDULE_KNOBS = frozenset({"steps_computation_mask", "scm_compute_bins", "scm_cache_bins", "schedules"})
CALIBRATOR_KNOBS = frozenset({"enable_taylorseer", "enable_dmd"})
GROUPS = (SCHEDULE_KNOBS, CALIBRATOR_KNOBS, *({name} for name in KNOBS.keys() - SCHEDULE_KNOBS - CALIBRATOR_KNOBS))
"""A schedule, and the choice of a calibrator, are taken whole from the strongest source that speaks of them: the
request's preset must not meet the environment's bins."""

EITHER_KNOBS = frozenset({
    "error_tolerance", "corrector", "corrector_order", "corrector_carry", "verify_ranks", "strict",
})
DBCACHE_KNOBS = frozenset(KNOBS) - EITHER_KNOBS
"""What decides steps and forecasts without an error tolerance; with one it would have no effect."""

INERT_KNOBS: Mapping[str, Knob] = {
    "enable_separate_cfg": Flag("No effect: every CFG branch always has a context of its own.", optional=True),
    "cfg_compute_first": Flag("No effect: branches are told apart by name, in any order.", optional=True),
}
"""Knobs of cache-dit that are read, checked, and need no action here."""

RETIRED_KNOBS: Mapping[str, str] = {
    "max_accumulated_diff": "there is no such setting any more: error_tolerance takes its place, it measures the "
    "forecast's error of each request",
}
"""Settings of earlier versions, and what to use."""


def contradictions(values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Settings of one source that contradict others of it: name, value, what is wrong."""
    if values.get("enable_taylorseer") and values.get("enable_dmd"):
        yield "enable_dmd", True, "TaylorSeer and DMD exclude each other, enable one"
    mask, compute, cache = (
        values.get(name) for name in ("steps_computation_mask", "scm_compute_bins", "scm_cache_bins")
    )
    for name, other in (("steps_computation_mask", mask), ("scm_compute_bins", compute)):
        if other is not None and values.get("schedules") is not None:
            yield name, other, "it excludes schedules, give one of them"
    if (compute is None) != (cache is None):
        missing = "scm_cache_bins" if cache is None else "scm_compute_bins"
        yield missing, None, "compute and cache bins are given together or not at all"
    steps = values.get("num_inference_steps")
    if isinstance(mask, tuple) and steps not in (None, len(mask)):
        yield "steps_computation_mask", f"{len(mask)} entries", f"expected {steps} entries, one a step"
    if compute is None or cache is None:
        return
    if len(compute) - len(cache) not in (0, 1):
        problem = f"expected {len(compute) - 1} or {len(compute)} cache bins for {len(compute)} compute bins"
        yield "scm_cache_bins", cache, problem
    if steps is not None and sum(compute) + sum(cache) < steps:
        problem = f"the bins cover {sum(compute) + sum(cache)} steps, expected at least {steps}"
        yield "scm_compute_bins", compute, problem
