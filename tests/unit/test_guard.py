"""Online safety of a static schedule: recomputes where the forecast is worse than when tuned, and only there."""

from __future__ import annotations

import math

import pytest
import torch

from sglang_cachedit_plugin.defaults import Defaults
from sglang_cachedit_plugin.errors import SettingError
from sglang_cachedit_plugin.guard import ForecastGuard, relative_error
from sglang_cachedit_plugin.sources import read_request
from sglang_cachedit_plugin.tune.surrogate import Method, spread

from .test_output_forecast import MASK, STATIC, CacheSettings, run, transformer  # noqa: F401
from .test_tune_search import recorded, wavy
from .test_tuned_session import serve

ROW = {"steps": 6, "mask": "111010"}


def test_the_error_is_relative_and_whatever_is_no_number_is_infinite():
    one, other = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])
    assert relative_error((other,), (one,)) == pytest.approx(0.2)
    assert relative_error({"a": one, "b": None}, {"a": one, "b": None}) == 0.0
    assert relative_error((one,), (torch.tensor([math.nan, 1.0]),)) == math.inf
    assert relative_error((one,), (torch.zeros(2),)) == math.inf


def test_excess_adds_up_until_a_step_is_within_again():
    guard = ForecastGuard(1.0, [0.1] * 8)
    guard.saw(0, 0.15)
    assert not guard.recompute(1)
    guard.saw(2, 0.17)
    assert guard.recompute(3)
    guard.saw(3, 0.09)
    assert not guard.recompute(4)
    guard.saw(4, 0.2)
    assert not guard.recompute(5)
    assert guard.recomputed == [3]
    assert "1 steps computed beyond the schedule" in guard.note("cond") and "2.0 times" in guard.note("cond")


def test_a_request_like_those_of_tuning_is_left_alone(transformer):  # noqa: F811
    settings = CacheSettings(**STATIC, max_accumulated_diff=0.5)
    plain, _, _ = run(transformer, CacheSettings(**STATIC))
    guarded, stats, _ = run(transformer, settings, spread=(1e6,) * len(MASK))
    assert all(torch.equal(a, b) for a, b in zip(plain, guarded, strict=True))
    assert stats.remarks == {}


def test_a_request_unlike_them_is_computed(transformer):  # noqa: F811
    settings = CacheSettings(**STATIC, max_accumulated_diff=0.5)
    _, stats, calls = run(transformer, settings, spread=(1e-9,) * len(MASK))
    assert stats.branches["cond"].cached == []
    assert sorted(calls) == sorted(list(range(len(MASK))) * 4)
    assert "3 steps computed beyond the schedule" in stats.remarks["cond"]


def test_the_report_says_what_the_guard_did():
    knobs = {"max_accumulated_diff": 1.0}
    _, quiet = serve([{**ROW, "spread": [1e6] * 6}], knobs=knobs)
    assert quiet["reason"] is None and quiet["cached_steps"] == 2
    _, loud = serve([{**ROW, "spread": [0.0] * 6}], knobs=knobs)
    assert loud["cached_steps"] == 0
    assert "cond: 2 steps computed beyond the schedule" in loud["reason"]
    _, untuned = serve([ROW], knobs=knobs)
    assert untuned["cached_steps"] == 2
    assert "max_accumulated_diff does nothing without a tuned schedule" in untuned["reason"]


def test_forecasts_of_the_residual_are_not_watched_and_a_request_is_told():
    with pytest.raises(SettingError, match=r"max_accumulated_diff = 1\.0 .*needs forecast: output"):
        Defaults().decide(True, {"max_accumulated_diff": 1.0})
    with pytest.raises(SettingError, match="needs forecast: output"):
        read_request({"max_accumulated_diff": 1.0, "forecast": "residual"})
    server = Defaults(environment=read_request({"max_accumulated_diff": 1.0, "forecast": "output"}))
    assert server.decide(True, None).resolved.primary.max_accumulated_diff == 1.0
    server = Defaults(environment=read_request({"max_accumulated_diff": 1.0}))
    assert server.decide(True, {"forecast": "residual"}).resolved.primary.forecast == "residual"


def test_the_tuned_spread_is_the_largest_error_of_the_extrapolation():
    trajectories, _ = recorded(wavy, count=2)
    mask = (1, 1, 0, 1, 0, 0, 1)
    found = spread(trajectories, mask, Method(order=1))
    outputs = [torch.tensor([list(wavy(prompt, step, None)) for step in range(7)]) for prompt in range(2)]
    places = torch.tensor(trajectories.timesteps)

    def line(values, a, b, at):
        return values[b] + (values[b] - values[a]) * (places[at] - places[b]) / (places[b] - places[a])

    expected = max(relative_error(line(values, 1, 3, 6), values[6]) for values in outputs)
    assert found[0] == 0.0
    assert found[6] == pytest.approx(expected, rel=1e-4)
    assert found[1] == pytest.approx(max(relative_error(v[0], v[1]) for v in outputs), rel=1e-4)
