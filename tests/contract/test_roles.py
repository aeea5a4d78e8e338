"""The report's way through the host's own functions where roles run apart, and offline requests."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from sglang_cachedit_plugin.errors import RefusedError, SettingError
from sglang_cachedit_plugin.integration import request as offline
from sglang_cachedit_plugin.integration import sglang_api
from sglang_cachedit_plugin.integration.request import add_report, attach
from sglang_cachedit_plugin.report.stats import RequestStats, TransformerStats
from sglang_cachedit_plugin.serving import responses, state


def stats() -> RequestStats:
    made = RequestStats(backend="native", enabled=True, config={"max_warmup_steps": {"value": 4, "origin": "default"}})
    transformer = made.transformers["transformer"] = TransformerStats(steps=3)
    for step in range(3):
        transformer.branch("cond").record(step, step == 2)
    return made


@pytest.fixture
def request_of_the_host(monkeypatch):
    """A real request that a denoiser has just finished."""
    from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
    from sglang.multimodal_gen.runtime.pipelines_core import Req

    monkeypatch.setattr(sglang_api, "is_first_rank", lambda: False)
    monkeypatch.setattr(state, "_current", state.ServerState())
    request = Req(sampling_params=SamplingParams(prompt="a", request_id="r1"))
    attach(request, stats())
    return request


def test_a_denoisers_report_is_in_the_answer_of_the_head(request_of_the_host):
    from sglang.multimodal_gen.runtime.disaggregation.scheduler_mixin import extract_transfer_fields

    _, scalars = extract_transfer_fields(request_of_the_host)
    message = json.loads(json.dumps({"request_id": "r1", "scalar_fields": scalars}))
    responses.remember(object(), message, "denoiser")
    decoded = SimpleNamespace(metrics=None, metrics_list=None)
    assert responses.add_report({}, {}, "r2", decoded) == {}
    assert responses.add_report({}, {}, "r1", decoded)["cache_dit"] == json.loads(json.dumps(stats().as_dict()))
    assert responses.add_report({}, {}, "r1", decoded) == {}
    assert state.current().totals.cached_steps == 1


def test_reports_that_nobody_asks_for_are_forgotten(monkeypatch):
    monkeypatch.setattr(state, "_current", state.ServerState())
    for number in range(state.MOST_APART + 5):
        responses.remember(None, {"request_id": str(number), "scalar_fields": {"_extra_cache_dit": {}}}, "denoiser")
    responses.remember(None, {"request_id": "without", "scalar_fields": None}, "encoder")
    assert len(state.current().apart) == state.MOST_APART
    assert "0" not in state.current().apart and str(state.MOST_APART + 4) in state.current().apart


def test_metrics_that_came_as_a_dictionary_keep_the_report(request_of_the_host):
    from sglang.multimodal_gen.runtime.disaggregation.orchestrator import _deserialize_request_metrics

    sent = add_report(request_of_the_host.metrics.to_dict(), request_of_the_host.metrics)
    data = json.loads(json.dumps(sent))
    restored = responses.restore(_deserialize_request_metrics(data), data)
    assert restored.cache_dit["cached_steps"] == 1
    assert responses.restore(None, None) is None


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"cache_dit_params": {"max_warmup_stepz": 1}}, "did you mean 'max_warmup_steps'"),
        ({"cache_dit_params": {"profile": "drfat"}}, "profile = 'drfat'"),
        ({"enable_cache_dit": "yes"}, "enable_cache_dit = 'yes'"),
    ],
)
def test_the_offline_engine_refuses_a_bad_setting_itself(fields, part):
    local, elsewhere = Generator([object()]), Generator(None)
    with pytest.raises(SettingError) as caught:
        offline.generate(pytest.fail, local, {"prompt": "a"} | fields)
    assert part in str(caught.value)
    assert offline.generate(lambda *given: given, elsewhere, fields) == (elsewhere, fields, None)
    good = {"prompt": "a", "enable_cache_dit": True}
    assert offline.generate(lambda *given: given, local, sampling_params_kwargs=good) == (local, good, None)
    assert offline.generate(lambda *given: given, local) == (local, None, None)


def test_the_offline_engine_raises_what_the_worker_refused_of_all_prompts():
    local, refusal = Generator([object()]), RefusedError("mask = '3 entries' (cache_dit_params): expected 6")

    def served(*errors, result=None):
        for error in errors:
            answer = SimpleNamespace(error=error and f"Error executing request r1: {error}", metrics=None)
            offline.answered(answer, local, [])
        return result

    with pytest.raises(ValueError, match=r"mask = '3 entries' \(cache_dit_params\): expected 6$"):
        offline.generate(lambda *given: served(refusal), local, {})
    assert offline.generate(lambda *given: served(refusal, None, result=["one"]), local, {}) == ["one"]
    assert offline.generate(lambda *given: served("CUDA error"), local, {}) is None
    assert offline.generate(lambda *given: None, local, {}) is None


class Generator:
    """As much of a DiffGenerator as says where its workers are."""

    def __init__(self, local_scheduler_process):
        self.local_scheduler_process = local_scheduler_process
