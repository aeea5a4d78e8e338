"""Counters on the host's ``/metrics``; where they are published is the caller's business.

Values come from the reports, so that they are the sum of them. prometheus_client is imported late: it chooses its
storage on import, after the host has named the folder that its processes share.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from .reasons import NOT_WANTED

STEPS = "sglang_cache_dit_steps_total"
REQUESTS = "sglang_cache_dit_requests_total"
DIFFS = "sglang_cache_dit_residual_diff"
NANS = "sglang_cache_dit_nan_diffs_total"
CORRECTED = "sglang_cache_dit_corrected_steps_total"
COMPUTED = "sglang_cache_dit_computed_steps"
BUCKETS = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.16, 0.2, 0.24, 0.3, 0.4, 0.5, 0.75, 1.0)
STEP_BUCKETS = (2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 50, 75, 100)
AGREE = "sglang_cache_dit_workers_agree"
OUTCOMES = ("cached", "off", "unavailable", "refused", "failed")
"""Some steps cached; not wanted; wanted, and nothing was cached; 400 for its cache settings; an exception."""
MAX_SERIES = 32
"""Most pairs of transformer and branch, and most profiles, that get numbers of their own; a series once made is never
given back."""
OTHER = "other"
NO_PROFILE = "none"


class _Instruments(NamedTuple):
    steps: Any
    requests: Any
    diffs: Any
    nans: Any
    corrected: Any
    computed: Any
    agree: Any


@functools.cache
def instruments() -> _Instruments:
    """The counters of this process, made on first use."""
    from prometheus_client import Counter, Gauge, Histogram

    where = ("transformer", "branch")
    return _Instruments(
        Counter(STEPS, "Denoising steps; kind: computed or cached.", (*where, "kind")),
        Counter(REQUESTS, f"Requests; outcome: {', '.join(OUTCOMES)}.", ("outcome",)),
        Histogram(DIFFS, "Residual differences measured.", where, buckets=BUCKETS),
        Counter(NANS, "Residual differences that were NaN or infinite.", where),
        Counter(CORRECTED, "Cached steps that the corrector set right."),
        Histogram(COMPUTED, "Computed steps of a request with caching.", ("profile",), buckets=STEP_BUCKETS),
        Gauge(AGREE, "1: all workers hold the server's settings, 0: they do not.", multiprocess_mode="mostrecent"),
    )


def outcome(report: Mapping[str, Any]) -> str:
    """One of ``OUTCOMES`` for a request that a worker served."""
    if not report["enabled"]:
        return "off" if NOT_WANTED.issuperset(report["reason_codes"]) else "unavailable"
    branches = (b for t in report["transformers"].values() for b in t["branches"].values())
    return "cached" if any(branch["cached"] for branch in branches) else "unavailable"


_branches: set[tuple[str, ...]] = set()
_profiles: set[tuple[str, ...]] = set()


def series(known: set[tuple[str, ...]], *labels: str) -> tuple[str, ...]:
    """The labels under which a number is kept: its own, or those of all that came too late for some."""
    if labels not in known:
        if len(known) >= MAX_SERIES:
            return (OTHER,) * len(labels)
        known.add(labels)
    return labels


def observe(report: Mapping[str, Any], *, requests: int = 1, ended: str | None = None) -> None:
    """Count one report, shared by ``requests`` requests that the host merged into one.

    Args:
        ended: how a request that was not served ended, ``failed`` or ``refused``.
    """
    made = instruments()
    made.requests.labels(ended or outcome(report)).inc(requests)
    if report["enabled"]:
        made.corrected.inc(report["corrector"]["corrected_steps"])
        if ended is None:
            profile = series(_profiles, report["profile"] or NO_PROFILE)
            made.computed.labels(*profile).observe(report["computed_steps"])
    for transformer, each in report["transformers"].items():
        for branch, steps in each["branches"].items():
            where = series(_branches, transformer, branch)
            for kind in ("computed", "cached"):
                made.steps.labels(*where, kind).inc(len(steps[kind]))
            diffs, nans = made.diffs.labels(*where), made.nans.labels(*where)
            for diff in steps["residual_diffs"].values():
                diffs.observe(diff)
            nans.inc(steps["nan_diffs"])


def agree(consistent: bool) -> None:
    """Whether all workers hold the settings of the HTTP process, which is the one that says so."""
    instruments().agree.set(consistent)


def refused() -> None:
    """Count one request whose settings were answered with 400, before it was a request of the cache."""
    instruments().requests.labels("refused").inc()
