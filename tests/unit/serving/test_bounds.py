"""Nothing that the plugin keeps grows with the number of requests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from prometheus_client import REGISTRY

from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.config.sources import read_overrides
from sglang_cachedit_plugin.integration import native
from sglang_cachedit_plugin.integration.request import WORKER, ActiveRequest
from sglang_cachedit_plugin.report import metrics
from sglang_cachedit_plugin.report.stats import RequestStats, TransformerStats
from sglang_cachedit_plugin.serving import responses, state
from sglang_cachedit_plugin.serving.state import LENGTH, History

REPORT = {"enabled": True, "computed_steps": 1, "cached_steps": 1, "config": {"a": 1}}


def test_the_page_keeps_the_last_reports_only_and_of_them_no_settings():
    history = History()
    for number in range(3 * LENGTH):
        history.add(str(number), REPORT)
    kept = history.since(0)
    assert [entry["id"] for entry in kept["requests"]] == [str(n) for n in range(2 * LENGTH, 3 * LENGTH)]
    assert all("config" not in entry["report"] for entry in kept["requests"])


def test_reports_that_nobody_fetches_are_dropped(monkeypatch):
    monkeypatch.setattr(state, "_current", state.ServerState())
    for number in range(2 * state.MOST_APART):
        responses.remember(None, {"request_id": str(number), "scalar_fields": {"_extra_cache_dit": REPORT}}, None)
    assert len(state.current().apart) == state.MOST_APART
    assert str(2 * state.MOST_APART - 1) in state.current().apart


def test_profiles_of_one_change_stay_known_for_the_next_one_only():
    settings = Defaults()
    for number in range(20):
        settings = settings.with_overrides(read_overrides({"profiles": {f"p{number}": {}}}))
    assert {*settings.retired, *settings.overrides.profiles} == {"p18", "p19"}


@pytest.fixture
def fresh_series(monkeypatch):
    for known in ("_branches", "_profiles"):
        monkeypatch.setattr(metrics, known, set())


def test_branches_without_end_share_a_series(fresh_series):
    stats = RequestStats(backend="diffusers", enabled=True)
    transformer = stats.transformers["bounds"] = TransformerStats(steps=2)
    for number in range(10 * metrics.MAX_SERIES):
        branch = transformer.branch(f"branch_{number}")
        branch.record(0, False)
        branch.record(1, True)
        branch.measured(1, 0.1)

    def counted(transformer: str) -> dict[str, float]:
        labels = [
            sample for family in REGISTRY.collect() for sample in family.samples
            if sample.name == metrics.STEPS and sample.labels["transformer"] == transformer
        ]
        return {f"{sample.labels['branch']} {sample.labels['kind']}": sample.value for sample in labels}

    before = counted(metrics.OTHER)
    for _ in range(2):
        metrics.observe(stats.as_dict())
    own, other = counted("bounds"), counted(metrics.OTHER)
    assert len(own) == 2 * metrics.MAX_SERIES and set(own.values()) == {2.0}
    grown = {key: value - before.get(key, 0.0) for key, value in other.items()}
    assert grown == {"other computed": 18.0 * metrics.MAX_SERIES, "other cached": 18.0 * metrics.MAX_SERIES}


def test_profiles_without_end_share_a_series(fresh_series):
    for number in range(2 * metrics.MAX_SERIES):
        metrics.observe(RequestStats(backend="native", enabled=True, profile=f"bounds_{number}").as_dict())
    profiles = {
        sample.labels["profile"] for family in REGISTRY.collect() for sample in family.samples
        if sample.name == f"{metrics.COMPUTED}_count"
    }
    assert sum(name.startswith("bounds_") for name in profiles) == metrics.MAX_SERIES
    assert metrics.OTHER in profiles


class Stage:
    """A stage of the host whose request fails, and so does its end."""

    def __init__(self):
        self.transformer = torch.nn.Linear(1, 1)


def test_a_request_that_fails_at_its_end_too_leaves_nothing_open(monkeypatch):
    closed = []

    class Session:
        recording = None

        def __init__(self, name, owner):
            self.name, self.owner = name, owner

        def close(self, device):
            closed.append((self.name, device.type))
            raise RuntimeError(self.name)

    def original(stage, batch, server_args):
        WORKER.active.sessions.extend(Session(name, stage) for name in ("outer", "inner"))
        raise ValueError("the request's own")

    with pytest.raises(RuntimeError):
        native.run_stage(original, Stage(), SimpleNamespace(), None)
    assert closed == [("inner", "cpu"), ("outer", "cpu")]
    assert WORKER.active == ActiveRequest()
