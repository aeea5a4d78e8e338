"""Reports in answers and refusals of requests, without a server."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient

from sglang_cachedit_plugin.config import effective
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.config.sources import read_file
from sglang_cachedit_plugin.errors import RefusedError, SettingError
from sglang_cachedit_plugin.serving import responses, state, validation


def report(enabled=True, computed=7, cached=5):
    return {"enabled": enabled, "computed_steps": computed, "cached_steps": cached}


def result(*reports, single=None):
    each = [None if r is None else SimpleNamespace(cache_dit=r) for r in reports]
    return SimpleNamespace(metrics=None if single is None else SimpleNamespace(cache_dit=single), metrics_list=each)


@pytest.fixture
def totals(monkeypatch):
    fresh = state.ServerState()
    monkeypatch.setattr(state, "_current", fresh)
    return fresh.totals


def test_the_report_is_added_to_the_answer(totals):
    assert responses.add_report({"id": "a"}, {}, "a", result(single=report())) == {"id": "a", "cache_dit": report()}
    assert totals == state.Totals(cached_requests=1, computed_steps=7, cached_steps=5)


@pytest.mark.parametrize("empty", [result(), result(None), SimpleNamespace(), SimpleNamespace(metrics=object())])
def test_without_a_report_the_answer_stays(totals, empty):
    answer = {"id": "a"}
    assert responses.add_report(answer, {}, "a", empty) is answer
    assert totals == state.Totals()


def test_outputs_that_ran_one_by_one_are_listed(totals):
    first, second = report(), report(computed=8, cached=4)
    answer = responses.add_report({}, {}, request_id="a", result=result(first, None, second))
    assert answer["cache_dit"] == first | {"outputs": [first, second]}
    assert totals == state.Totals(cached_requests=1, computed_steps=15, cached_steps=9)


def test_uncached_answers_are_counted_apart(totals):
    responses.add_report({}, {}, "a", result(report(enabled=False, computed=12, cached=0)))
    assert totals == state.Totals(uncached_requests=1, computed_steps=12)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"cache_dit_params": {"max_warmup_stepz": 1}}, ["max_warmup_stepz = 1", "did you mean 'max_warmup_steps'"]),
        ({"cache_dit_params": {"residual_diff_threshold": "x"}}, ["= 'x' (cache_dit_params)", "from 0 to 1"]),
        ({"cache_dit_params": "fast"}, ["cache_dit_params = 'fast'", "expected a mapping"]),
        ({"cache_dit_params": []}, ["cache_dit_params = []", "expected a mapping"]),
        ({"enable_cache_dit": "yes"}, ["enable_cache_dit = 'yes' (request)", "expected true or false"]),
        ({"enable_cache_dit": 1}, ["enable_cache_dit = 1"]),
        ({"enable_cache_dit": False, "cache_dit_params": {"profile": "x"}}, ["profile = 'x'"]),
    ],
)
def test_a_bad_request_is_400_in_one_line(fields, parts):
    with pytest.raises(HTTPException) as caught:
        validation.check("id", prompt="a", **fields)
    assert caught.value.status_code == 400
    assert "\n" not in caught.value.detail
    for part in parts:
        assert part in caught.value.detail


def test_a_good_request_passes_with_the_files_profiles(monkeypatch):
    monkeypatch.setattr(effective, "_current", Defaults(file=read_file({"profiles": {"draft": {}}})))
    for name in ("draft", "fast"):
        assert validation.check("id", enable_cache_dit=True, cache_dit_params={"profile": name}) is None
    assert validation.check("id", enable_cache_dit=None, cache_dit_params=None) is None
    assert validation.check("id") is None


def test_a_refusal_of_the_worker_is_400_and_any_other_error_stays():
    refusal = RefusedError(SettingError("strict", True, "SGLANG_CACHE_DIT_STRICT", "two blocks\nare too many"))
    errors = {
        "refused": RuntimeError(f"Model generation failed. Error from scheduler: Error executing request a: {refusal}"),
        "failed": RuntimeError("Model generation failed. Error from scheduler: CUDA error"),
        "else": NotImplementedError("a subclass"),
    }
    app = FastAPI()
    app.add_exception_handler(RuntimeError, validation.answer)

    @app.get("/{name}")
    def fail(name: str):
        raise errors[name]

    http = TestClient(app)
    answer = http.get("/refused")
    assert answer.status_code == 400
    assert answer.json() == {"detail": "strict = True (SGLANG_CACHE_DIT_STRICT): two blocks are too many"}
    for name in ("failed", "else"):
        with pytest.raises(type(errors[name])) as caught:
            http.get(f"/{name}")
        assert caught.value is errors[name]
    assert TestClient(app, raise_server_exceptions=False).get("/failed").status_code == 500
