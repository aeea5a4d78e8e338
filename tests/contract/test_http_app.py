"""The host's own HTTP application with the plugin's addresses, without workers: what never reaches one."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient

from sglang_cachedit_plugin.config import effective
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.integration import sglang_api
from sglang_cachedit_plugin.serving import app, state

GENERATES = ("/v1/images/generations", "/v1/images/edits", "/v1/videos")
MISPLACED = {
    "misspelt": ({"cache_dit_parms": {"profile": "fast"}}, "did you mean 'cache_dit_params'?"),
    "beside": ({"max_warmup_steps": 2}, "settings of the cache stand in cache_dit_params"),
    "nested": ({"extra_params": {"enable_cachedit": True}}, "did you mean 'enable_cache_dit'?"),
    "the profiler's": ({"profile": "fast"}, 'a profile of the cache is cache_dit_params: {"profile": ...}'),
}


@pytest.fixture
def said(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(sglang_api, "logger", lambda: SimpleNamespace(info=lines.append))
    return lines


@pytest.fixture
def http(monkeypatch, said):
    """A second application of this process: what the first one did to the host's modules must not add up."""
    from sglang.multimodal_gen.runtime.entrypoints import http_server

    monkeypatch.setattr(effective, "_current", Defaults())
    monkeypatch.setattr(state, "_current", state.current())
    args = SimpleNamespace(
        enable_metrics=False, cache_dit_config=None, enable_breakable_cuda_graph=False,
        pipeline_config=SimpleNamespace(supports_action_endpoint=lambda: False, supports_openpi_endpoint=lambda: False),
    )
    app.create(http_server.create_app, args)
    made = app.create(http_server.create_app, args)
    assert made.state.cache_dit is state.current()
    return TestClient(made)


@pytest.mark.parametrize("name", MISPLACED)
def test_a_field_that_looks_like_ours_is_400_on_every_address(http, said, name):
    fields, words = MISPLACED[name]
    body = {"prompt": "a"} | fields
    form = {key: value if isinstance(value, str) else json.dumps(value) for key, value in body.items()}
    answers = [
        http.post("/v1/images/generations", json=body), http.post("/v1/videos", json=body),
        http.post("/v1/videos", data=form, files={"other": ("a", b"x")}),
        http.post("/v1/images/edits", data=form, files={"image": ("in.png", b"x")}),
    ]
    for answer in answers:
        assert answer.status_code == 400, answer.request.url
        assert words in answer.json()["detail"] and len(answer.json()["detail"].splitlines()) == 1
    assert len(said) == len(answers)
    start = "cache-dit: POST /v1/images/generations from testclient refused (400): "
    assert said[0] == start + answers[0].json()["detail"]


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b'"a"'])
def test_a_body_that_is_no_object_is_left_to_the_host(http, content):
    headers = {"content-type": "application/json"}
    assert http.post("/v1/images/generations", content=content, headers=headers).status_code == 422


def test_openapi_has_the_fields_of_requests_and_answers(http):
    described = http.get("/openapi.json").json()
    schemas = described["components"]["schemas"]
    for address in GENERATES:
        for content in described["paths"][address]["post"]["requestBody"]["content"].values():
            fields = schemas[content["schema"]["$ref"].rpartition("/")[2]]["properties"]
            assert {"profile", "secondary", "residual_diff_threshold"} <= set(fields["cache_dit_params"]["properties"])
            assert fields["enable_cache_dit"]["type"] == "boolean"
    for model in ("ImageResponse", "VideoResponse"):
        assert "cache_dit" in schemas[model]["properties"]


@pytest.mark.parametrize("address", ["/docs", "/cache_dit"])
def test_pages_load_nothing_from_elsewhere(http, address):
    page = http.get(address)
    assert page.status_code == 200
    own = "data:|cache_dit|openapi.json|docs/swagger"
    assert not re.findall(rf"(?:src|href)=[\"'](?!{own})|https?://|@import", page.text)
    for word in ("POST /v1/images/generations", "PATCH /v1/cache_dit", "cache_dit_params", "num_inference_steps"):
        assert address == "/cache_dit" or word in page.text
    assert "swagger-ui" in http.get("/docs/swagger").text
