"""Every setting of the cache: type, range, unit, default and what it does.

The knobs of DBCache, TaylorSeer and DMD keep the names of cache-dit
(``cache_dit.DBCacheConfig``, ``TaylorSeerCalibratorConfig``, ``DMDCalibratorConfig``);
defaults are those of SGLang's environment variables, the same on both backends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import SettingError
from .knobs import MAX_LENGTH, PRESETS, Knob
from .tuned_schedules import TunedSchedule

__all__ = [
    "ALIASES", "CALIBRATOR_KNOBS", "INERT_KNOBS", "KNOBS", "MAX_LENGTH", "PRESETS", "RETIRED_KNOBS",
    "SCHEDULE_KNOBS", "CacheSettings", "Knob", "check_consistent",
]


def _knob(default: Any, kind: str, doc: str, **options: Any) -> Any:
    return field(default=default, metadata={"knob": Knob(kind=kind, doc=doc, **options)})


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """The settings in force for one transformer during one request."""

    Fn_compute_blocks: int = _knob(
        1, "int", "First blocks that run on every step; their residual is compared.",
        unit="blocks", low=1, env="FN", per_transformer=True,
    )
    Bn_compute_blocks: int = _knob(
        0, "int", "Last blocks that run on every step.", unit="blocks", low=0, env="BN", per_transformer=True
    )
    max_warmup_steps: int = _knob(
        4, "int", "Steps computed before caching starts.",
        unit="steps", low=0, env="WARMUP", per_transformer=True,
    )
    warmup_interval: int = _knob(
        1, "int", "Within the warmup only every n-th step must be computed.",
        unit="steps", low=1, per_transformer=True,
    )
    residual_diff_threshold: float = _knob(
        0.24, "float", "Relative L1 difference of the first blocks' residual under which a step is cached: "
        "0 never, 1 always.", low=0.0, high=1.0, env="RDT", per_transformer=True,
    )
    max_accumulated_residual_diff_threshold: float | None = _knob(
        None, "float", "Sum of all differences after which nothing more is cached.",
        low=0.0, optional=True, per_transformer=True,
    )
    max_cached_steps: int = _knob(
        -1, "int", "Most cached steps of a request; -1: no limit.", unit="steps", low=-1, per_transformer=True
    )
    max_continuous_cached_steps: int = _knob(
        3, "int", "Most cached steps in a row; -1: no limit.",
        unit="steps", low=-1, env="MC", per_transformer=True,
    )
    enable_taylorseer: bool = _knob(
        False, "bool", "Forecast the residual with a Taylor expansion (arXiv 2503.06923).",
        env="TAYLORSEER", per_transformer=True,
    )
    taylorseer_order: int = _knob(
        1, "int", "Order of the Taylor expansion.", low=1, high=2, env="TS_ORDER", per_transformer=True
    )
    enable_dmd: bool = _knob(
        False, "bool", "Forecast the residual with dynamic mode decomposition; excludes TaylorSeer.",
        env="DMD", per_transformer=True,
    )
    dmd_history: int = _knob(
        6, "int", "Computed steps that the decomposition looks back on.",
        unit="steps", low=2, high=64, env="DMD_HISTORY", per_transformer=True,
    )
    dmd_rank: int = _knob(
        0, "int", "Rank kept of the decomposition; 0: chosen from the spectrum.",
        low=0, high=64, env="DMD_RANK", per_transformer=True,
    )
    dmd_ridge: float = _knob(
        1e-8, "float", "Tikhonov term added to the singular values.",
        low=0.0, high=1.0, env="DMD_RIDGE", per_transformer=True,
    )
    dmd_svd_precision: str = _knob(
        "medium", "choice", "Precision of the sums that the decomposition is made from: low float32, medium and high "
        "float64.",
        choices=("low", "medium", "high"), env="DMD_SVD_PRECISION", per_transformer=True,
    )
    num_inference_steps: int | None = _knob(
        None, "int", "Steps that bins or a mask list were written for.", unit="steps", low=1, optional=True
    )
    steps_computation_mask: str | tuple[int, ...] | None = _knob(
        None, "mask", "Schedule: a preset or one entry a step, 1 computed and 0 may be cached.",
        optional=True, env="SCM_PRESET", per_transformer=True,
    )
    scm_compute_bins: tuple[int, ...] | None = _knob(
        None, "bins", "Schedule as bins: lengths of the computed runs.",
        unit="steps", optional=True, env="SCM_COMPUTE_BINS", per_transformer=True,
    )
    scm_cache_bins: tuple[int, ...] | None = _knob(
        None, "bins", "Schedule as bins: lengths of the cached runs between them.",
        unit="steps", optional=True, env="SCM_CACHE_BINS", per_transformer=True,
    )
    schedules: tuple[TunedSchedule, ...] | None = _knob(
        None, "rows", "Tuned schedules for numbers of steps and sizes; others are resampled from the nearest.",
        optional=True, per_transformer=True,
    )
    steps_computation_policy: str = _knob(
        "dynamic", "choice",
        "Steps that a schedule marks 0: dynamic asks the threshold, static always caches.",
        choices=("dynamic", "static"), env="SCM_POLICY", per_transformer=True,
    )
    cfg_diff_compute_separate: bool = _knob(
        True, "bool", "Measure the difference for each CFG branch; false: the other branches follow cond."
    )
    lockstep: bool = _knob(
        False, "bool", "Under CFG parallelism both ranks compute if either must.", env="LOCKSTEP"
    )
    verify_ranks: bool = _knob(
        False, "bool", "Compare the decisions of all ranks on every step and stop if they differ.",
        env="VERIFY_RANKS",
    )
    forecast: str = _knob(
        "residual", "choice", "What is forecast on a cached step: the blocks' residual, or the whole model "
        "output (nothing of the transformer runs).", choices=("residual", "output"), env="FORECAST",
        per_transformer=True,
    )
    forecast_order: int = _knob(
        1, "int", "Order of the extrapolation of the model output.",
        low=1, high=3, env="FORECAST_ORDER", per_transformer=True,
    )
    forecast_damping: float = _knob(
        1.0, "float", "What each order of that extrapolation counts, in powers: 1 the whole polynomial, 0 the last "
        "output.", low=0.0, high=1.0, env="FORECAST_DAMPING", per_transformer=True,
    )
    error_tolerance: float | None = _knob(
        None, "float", "Error of the model output that cached steps may pass on, relative to the output: chooses the "
        "steps of each request from the error of its own forecasts. 0 computes every step.",
        low=0.0, high=1.0, optional=True, env="ERROR_TOLERANCE",
    )
    corrector: bool = _knob(
        True, "bool", "Set cached steps right when the next output is computed: the scheduler goes back and repeats "
        "them. No evaluation of the model.", env="CORRECTOR",
    )
    corrector_order: int = _knob(
        2, "int", "Degree of the polynomial through the computed outputs that corrects cached steps.",
        low=1, high=2, env="CORRECTOR_ORDER",
    )
    corrector_carry: float | None = _knob(
        None, "float", "How far a computed output follows its corrected latents: 1 keeps the predicted clean latents, "
        "0 the output. Unset: 0.75 under an error tolerance, otherwise 0.5.", low=0.0, high=1.0, optional=True,
        env="CORRECTOR_CARRY",
    )
    strict: bool = _knob(
        False, "bool", "Refuse what cannot be cached as asked, instead of going on uncached: 400 on a server.",
        env="STRICT",
    )

    @property
    def calibrator(self) -> str | None:
        """The forecast of the residual: ``taylorseer``, ``dmd`` or None (the last residual is reused)."""
        if self.enable_taylorseer:
            return "taylorseer"
        return "dmd" if self.enable_dmd else None


KNOBS: Mapping[str, Knob] = {f.name: f.metadata["knob"] for f in fields(CacheSettings)}

ALIASES: Mapping[str, str] = {
    "scm_preset": "steps_computation_mask",
    "scm_policy": "steps_computation_policy",
}
"""Other spellings of a setting, as requests and variables write it."""

SCHEDULE_KNOBS = frozenset({"steps_computation_mask", "scm_compute_bins", "scm_cache_bins", "schedules"})
CALIBRATOR_KNOBS = frozenset({"enable_taylorseer", "enable_dmd"})

EITHER_KNOBS = frozenset({
    "error_tolerance", "corrector", "corrector_order", "corrector_carry", "verify_ranks", "strict",
})
DBCACHE_KNOBS = frozenset(KNOBS) - EITHER_KNOBS
"""What decides steps and forecasts without an error tolerance; with one it would have no effect."""

INERT_KNOBS: Mapping[str, str] = {
    "enable_separate_cfg": "every CFG branch always has a context of its own",
    "cfg_compute_first": "branches are told apart by name, their order does not matter",
}
"""Knobs of cache-dit that are read, checked as booleans, and need no action here."""

RETIRED_KNOBS: Mapping[str, str] = {
    "max_accumulated_diff": "there is no such setting any more: error_tolerance takes its place, it measures the "
    "forecast's error of each request",
}
"""Settings of earlier versions, and what to use."""


def check_consistent(values: Mapping[str, Any], origin: str, spelt: Mapping[str, str] | None = None) -> None:
    """Refuse settings of one source that contradict each other.

    Args:
        spelt: what this source calls a setting, where that is another name.
    """
    names = {name: name for name in KNOBS} | dict(spelt or {})
    if values.get("enable_taylorseer") and values.get("enable_dmd"):
        raise SettingError(names["enable_dmd"], True, origin, "TaylorSeer and DMD exclude each other, enable one")
    if values.get("schedules") is not None:
        for other in ("steps_computation_mask", "scm_compute_bins"):
            if values.get(other) is not None:
                raise SettingError(names[other], values[other], origin, "it excludes schedules, give one of them")
    _check_bins(values, origin, names)


def _check_bins(values: Mapping[str, Any], origin: str, names: Mapping[str, str]) -> None:
    compute, cache = values.get("scm_compute_bins"), values.get("scm_cache_bins")
    if (compute is None) != (cache is None):
        missing = "scm_cache_bins" if cache is None else "scm_compute_bins"
        raise SettingError(names[missing], None, origin, "compute and cache bins are given together or not at all")
    if compute is not None and len(compute) - len(cache) not in (0, 1):
        raise SettingError(
            names["scm_cache_bins"], cache, origin,
            f"expected {len(compute) - 1} or {len(compute)} cache bins for {len(compute)} compute bins",
        )
    steps = values.get("num_inference_steps")
    if steps is None:
        return
    mask = values.get("steps_computation_mask")
    if isinstance(mask, tuple) and len(mask) != steps:
        raise SettingError(
            names["steps_computation_mask"], f"{len(mask)} entries", origin, f"expected {steps} entries, one a step"
        )
    if compute is not None and sum(compute) + sum(cache) < steps:
        raise SettingError(
            names["scm_compute_bins"], compute, origin,
            f"the bins cover {sum(compute) + sum(cache)} steps, expected at least {steps}",
        )
