"""The report of a request, in the form that clients rely on, and its log lines."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_cachedit_plugin.errors import Reason
from sglang_cachedit_plugin.report.stats import (
    BranchStats,
    CorrectorStats,
    ErrorStats,
    RequestStats,
    TransformerStats,
    percentile,
)


def finished() -> RequestStats:
    stats = RequestStats(
        backend="native", enabled=True, config={"Fn_compute_blocks": {"value": 1, "origin": "default"}}
    )
    transformer = stats.transformers["transformer"] = TransformerStats(steps=12)
    cond = transformer.branch("cond")
    for step in range(12):
        cond.record(step, step in {4, 6, 8, 9, 11})
    cond.measured(4, 0.11)
    stats.denoising_s = 1.1
    return stats


def test_the_report_has_the_fixed_form():
    report = finished().as_dict()
    assert report == {
        "enabled": True, "reason": None, "reason_codes": [], "backend": "native", "profile": None,
        "config": {"Fn_compute_blocks": {"value": 1, "origin": "default"}},
        "computed_steps": 7, "cached_steps": 5, "denoising_s": 1.10,
        "corrector": {"enabled": True, "reason": None, "corrected_steps": 0, "largest_correction": None},
        "error_control": None,
        "transformers": {"transformer": {"steps": 12, "branches": {
            "cond": {"computed": [0, 1, 2, 3, 5, 7, 10], "cached": [4, 6, 8, 9, 11],
                     "residual_diffs": {"4": 0.11}, "nan_diffs": 0}}}},
    }
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_a_request_that_was_not_cached():
    stats = RequestStats(backend="diffusers", enabled=False, reason=Reason("request", "request"))
    assert stats.as_dict() == {
        "enabled": False, "reason": "request", "reason_codes": ["request"],
        "backend": "diffusers", "profile": None, "config": {},
        "computed_steps": 0, "cached_steps": 0, "denoising_s": 0.0, "corrector": None, "error_control": None,
        "transformers": {},
    }
    assert stats.line("r1") == "cache-dit: r1: off [request]: request"


def test_steps_count_cond_over_all_transformers():
    stats = finished()
    stats.transformers["transformer"].branch("uncond").record(0, True)
    low = stats.transformers["transformer_2"] = TransformerStats(steps=2)
    low.branch("uncond").record(12, False)
    low.branch("cond").record(12, False)
    low.branch("cond").record(13, True)
    only = stats.transformers["third"] = TransformerStats(steps=1)
    only.branch("positive").record(0, False)
    assert (stats.count("computed"), stats.count("cached")) == (9, 6)


@pytest.mark.parametrize("diff", [math.nan, math.inf, -math.inf])
def test_a_difference_that_is_no_number_is_counted_and_not_listed(diff):
    stats = finished()
    branch = stats.transformers["transformer"].branch("cond")
    branch.measured(5, diff)
    branch.measured(6, diff)
    report = stats.as_dict()
    assert branch.nan_diffs == 2
    assert report["transformers"]["transformer"]["branches"]["cond"]["residual_diffs"] == {"4": 0.11}
    assert report["reason"] == "transformer: 2 residual differences were NaN, these steps were computed"
    json.dumps(report, allow_nan=False)


def test_the_first_of_two_block_lists_is_the_one_listed():
    branch = BranchStats()
    branch.measured(3, 0.25)
    branch.measured(3, 0.75)
    assert branch.residual_diffs == {3: 0.25}


def test_a_further_stage_adds_its_corrections_and_keeps_its_errors():
    stats, second = finished(), finished()
    stats.corrector = CorrectorStats(corrected_steps=4, largest_correction=0.1)
    second.corrector = CorrectorStats(corrected_steps=3, largest_correction=0.3)
    second.error_control = ErrorStats(tolerance=0.01, errors={5: 0.02}, passed_on=0.001)
    stats.add_stage("Refinement", second)
    stats.add_stage("Other", RequestStats(backend="native", enabled=False, reason="request"))
    report = stats.as_dict()
    assert report["corrector"] == {
        "enabled": True, "reason": None, "corrected_steps": 7, "largest_correction": 0.3,
    }
    assert report["error_control"] == {"tolerance": 0.01, "errors": {"5": 0.02}, "passed_on": 0.001}
    stats.error_control = ErrorStats(tolerance=0.01, errors={5: 0.01}, passed_on=0.004)
    stats.add_stage("Refinement", second)
    assert stats.as_dict()["error_control"] == {
        "tolerance": 0.01, "errors": {"5": 0.01, "Refinement: 5": 0.02}, "passed_on": 0.005,
    }


def test_a_stage_that_corrects_follows_one_without_caching():
    stats, second = RequestStats(backend="native", enabled=False, reason="no blocks"), finished()
    second.corrector = CorrectorStats(corrected_steps=3, largest_correction=0.3)
    stats.add_stage("Refinement", second)
    assert stats.as_dict()["corrector"]["corrected_steps"] == 3


def test_log_lines():
    stats = finished()
    for step, diff in enumerate([0.05, 0.09, 0.214]):
        stats.transformers["transformer"].branch("uncond").measured(step, diff)
    said = "cache-dit: r1: 12 steps, 7 computed, 5 cached (cond), diffs p50 0.09 p95 0.21, denoising 1.10 s"
    assert stats.line("r1") == said
    stats.note(Reason("schedule", "schedule off: 5 steps, presets and bins need 8"))
    stats.note(Reason("schedule", "schedule off: 5 steps, presets and bins need 8"))
    stats.transformers["transformer"].notes.append("cond: forwards cannot be told apart")
    assert stats.line("r1", "failed") == said.replace("r1:", "r1: failed,") + (
        "; limited [schedule, branches]: schedule off: 5 steps, presets and bins need 8; "
        "transformer: cond: forwards cannot be told apart"
    )
    static = finished()
    static.transformers["transformer"].branch("cond").residual_diffs.clear()
    assert static.line() == "cache-dit: 12 steps, 7 computed, 5 cached (cond), denoising 1.10 s"


def test_a_request_that_failed_to_mount_says_why_and_claims_nothing():
    stats = RequestStats(backend="native", enabled=False, reason="X: no adapter describes its blocks")
    assert stats.line() == "cache-dit: off [other]: X: no adapter describes its blocks"
    assert stats.line("r1", "refused") == "cache-dit: r1: refused [other]: X: no adapter describes its blocks"


@given(st.lists(st.floats(0, 1), min_size=1), st.sampled_from([0, 5, 50, 95, 100]))
def test_percentiles_are_values_with_that_share_below(values, rank):
    value = percentile(sorted(values), rank)
    assert value in values
    assert sum(v <= value for v in values) >= len(values) * rank / 100
    assert sum(v < value for v in values) <= len(values) * rank / 100
