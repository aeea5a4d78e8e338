"""Counters grow by what the reports say, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fastapi import HTTPException
from prometheus_client import REGISTRY

from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.errors import Reason, RefusedError
from sglang_cachedit_plugin.integration import sglang_api
from sglang_cachedit_plugin.integration.request import WARMUP, Session, attach, count, decide
from sglang_cachedit_plugin.report import metrics
from sglang_cachedit_plugin.report.stats import RequestStats, TransformerStats
from sglang_cachedit_plugin.serving import state, validation


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def stats(enabled=True, cached=(2, 4), diffs=((2, 0.1), (3, 0.5), (4, float("nan")))) -> RequestStats:
    made = RequestStats(backend="native", enabled=enabled)
    if enabled:
        transformer = made.transformers["test"] = TransformerStats(steps=6)
        for name in ("cond", "uncond"):
            branch = transformer.branch(name)
            for step in range(6):
                branch.record(step, step in cached)
            for step, diff in diffs:
                branch.measured(step, diff)
    return made


def unwanted(code: str) -> RequestStats:
    made = stats(enabled=False)
    made.reason = Reason(code, "why")
    return made


def batch(**fields):
    return SimpleNamespace(**{"metrics": SimpleNamespace(), "extra": {}, "is_warmup": False} | fields)


@pytest.fixture
def worker(monkeypatch):
    """A rank that speaks for its replica, with metrics on."""
    monkeypatch.setattr(sglang_api, "publishes_metrics", lambda: True)
    monkeypatch.setattr(sglang_api, "is_first_rank", lambda: False)


def steps(branch: str, kind: str) -> float:
    return value(metrics.STEPS, transformer="test", branch=branch, kind=kind)


def test_a_report_is_counted_by_transformer_branch_and_kind(worker):
    where = {"transformer": "test", "branch": "uncond"}
    names = (f"{metrics.DIFFS}_count", f"{metrics.DIFFS}_sum", metrics.NANS)
    before = [steps("uncond", "computed"), steps("uncond", "cached"), *(value(name, **where) for name in names)]
    count([batch()], stats())
    after = [steps("uncond", "computed"), steps("uncond", "cached"), *(value(name, **where) for name in names)]
    assert [b - a for a, b in zip(before, after, strict=True)] == pytest.approx([4, 2, 2, 0.6, 1])


def test_corrected_steps_and_the_computed_steps_of_a_profile_are_counted(worker):
    names = [(f"{metrics.COMPUTED}_count", {"profile": "own"}), (f"{metrics.COMPUTED}_sum", {"profile": "own"}),
             (metrics.CORRECTED, {})]
    before = [value(name, **labels) for name, labels in names]
    served, failed = stats(), stats()
    for each in (served, failed):
        each.profile, each.corrector.corrected_steps = "own", 2
    count([batch()], served)
    count([batch()], failed, failed=True)
    after = [value(name, **labels) for name, labels in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 4, 4]


def test_a_request_without_caching_has_no_computed_steps(worker):
    before = value(f"{metrics.COMPUTED}_count", profile=metrics.NO_PROFILE)
    count([batch()], stats(enabled=False))
    assert value(f"{metrics.COMPUTED}_count", profile=metrics.NO_PROFILE) == before


@pytest.mark.parametrize(
    ("made", "failed", "outcome"),
    [
        (stats(), False, "cached"),
        (stats(cached=()), False, "unavailable"),
        (unwanted("request"), False, "off"),
        (unwanted("not_configured"), False, "off"),
        (unwanted("no_adapter"), False, "unavailable"),
        (stats(enabled=False), False, "off"),
        (stats(), True, "failed"),
    ],
)
def test_the_outcome(worker, made, failed, outcome):
    before = {name: value(metrics.REQUESTS, outcome=name) for name in metrics.OUTCOMES}
    count([batch()], made, failed=failed)
    grown = {name for name in metrics.OUTCOMES if value(metrics.REQUESTS, outcome=name) != before[name]}
    assert grown == {outcome}


def test_a_refusal_is_no_failure(worker):
    before = {name: value(metrics.REQUESTS, outcome=name) for name in metrics.OUTCOMES}
    session = Session("native", Defaults().decide(True, {"strict": True}))
    with pytest.raises(RefusedError, match=r"strict = True \(cache_dit_params.strict\): no blocks$"):
        session.refuse("no blocks")
    made = batch()
    stats = session.close()
    attach(made, stats)
    count([made], stats, failed=True)
    grown = {name for name in metrics.OUTCOMES if value(metrics.REQUESTS, outcome=name) != before[name]}
    assert grown == {"refused"}
    assert (made.metrics.cache_dit["enabled"], made.metrics.cache_dit["reason"]) == (False, "no blocks")


def test_what_the_workers_settings_no_longer_take_counts_as_refused(worker):
    before = value(metrics.REQUESTS, outcome="refused")
    with pytest.raises(RefusedError, match=r"profile = 'mine' \(cache_dit_params\): expected one of"):
        decide(True, {"profile": "mine"})
    assert value(metrics.REQUESTS, outcome="refused") - before == 1


def test_requests_that_the_host_merged_count_each_and_their_steps_once(worker):
    before = value(metrics.REQUESTS, outcome="cached"), steps("cond", "cached")
    count([batch(extra={"dynamic_batch_seeds": [1, 2, 3]})], stats())
    assert value(metrics.REQUESTS, outcome="cached") - before[0] == 3
    assert steps("cond", "cached") - before[1] == 2


@pytest.mark.parametrize(
    "fields", [{"is_warmup": True}, {"extra": {"server_internal_prewarm": True}}, {"extra": {WARMUP: True}}]
)
def test_requests_that_only_warm_up_are_neither_counted_nor_logged(monkeypatch, worker, fields):
    before = value(metrics.REQUESTS, outcome="cached")
    monkeypatch.setattr(sglang_api, "is_first_rank", pytest.fail)
    count([batch(**fields)], stats())
    assert value(metrics.REQUESTS, outcome="cached") == before


def test_only_the_rank_that_speaks_for_its_replica_counts(monkeypatch, worker):
    monkeypatch.setattr(sglang_api, "publishes_metrics", lambda: False)
    before = value(metrics.REQUESTS, outcome="cached")
    count([batch()], stats())
    assert value(metrics.REQUESTS, outcome="cached") == before


@pytest.mark.parametrize(("counting", "grown"), [(True, 1), (False, 0)])
def test_refusals_are_counted_where_metrics_are_on(monkeypatch, counting, grown):
    monkeypatch.setattr(state, "_current", state.ServerState(counting=counting))
    before = value(metrics.REQUESTS, outcome="refused")
    with pytest.raises(HTTPException):
        validation.check("id", cache_dit_params={"max_warmup_stepz": 1})
    assert value(metrics.REQUESTS, outcome="refused") - before == grown
