"""POST /generate without a model: what goes on, what is left out, what is refused; the page's parts."""

from __future__ import annotations

import re
import socket

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from sglang_cachedit_plugin import client
from sglang_cachedit_plugin.serving import generate, page, responses, state
from sglang_cachedit_plugin.serving.generate_models import GenerateRequest
from tests.unit.local_server import serving

TAKEN = frozenset({"prompt", "guidance_scale", "num_frames"})


def fit(video=False, taken=None, extra=(), **fields):
    body = GenerateRequest.model_validate({"prompt": "a"} | fields)
    return generate.fit(body, video=video, taken=taken, extra=frozenset(extra))


def test_only_what_was_given_goes_on():
    arguments, notes = fit(width=64, num_inference_steps=5, negative_prompt=None)
    assert arguments == {
        "width": 64, "num_inference_steps": 5, "generator_device": "cpu", "cache_dit_params": None
    }
    assert notes == []


@pytest.mark.parametrize("name", ["num_frames", "fps"])
def test_a_pictures_model_draws_no_frames(name):
    arguments, notes = fit(**{name: 9})
    assert name not in arguments and notes == [f"{name} was left out: this model draws pictures"]
    assert fit(video=True, **{name: 9})[0][name] == 9


def test_arguments_that_the_pipeline_does_not_take_are_left_out():
    arguments, notes = fit(taken=TAKEN, negative_prompt="b", true_cfg_scale=2.0, guidance_scale=3.0)
    assert arguments["guidance_scale"] == 3.0
    assert not {"negative_prompt", "true_cfg_scale"} & arguments.keys()
    assert [note.split()[0] for note in notes] == ["negative_prompt", "true_cfg_scale"]
    assert fit(negative_prompt="b")[0]["negative_prompt"] == "b"


def test_arguments_of_one_model_go_on_and_others_are_left_out():
    arguments, notes = fit(extra=["flow_shift"], flow_shift=3.0, sedd=1, image_path="/tmp/x")
    assert arguments["flow_shift"] == 3.0
    assert not {"sedd", "image_path"} & arguments.keys()
    assert notes == [
        "image_path was left out: this model has no such argument",
        "sedd was left out: this model has no such argument; did you mean 'seed'?",
    ]


def test_a_profile_is_a_cache_parameter():
    assert fit(profile="fast")[0]["cache_dit_params"] == {"profile": "fast"}
    params = {"max_warmup_steps": 1, "profile": "fast"}
    assert fit(profile="fast", cache_dit_params=params)[0]["cache_dit_params"] == params
    with pytest.raises(generate.HTTPException) as caught:
        fit(profile="fast", cache_dit_params={"profile": "quality"})
    assert caught.value.status_code == 400


@pytest.fixture
def app():
    app = FastAPI()
    state.install(app, state.ServerState())
    for router in (page.router, generate.router):
        app.include_router(router)
    return app


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"prompt": "a", "width": "x"}', ["width = 'x' (request): expected a valid integer"]),
        ('{"prompt": "a", "width": true}', ["width = True (request)"]),
        ('{"prompt": "a", "num_inference_steps": 0}', ["num_inference_steps = 0", "greater than or equal to 1"]),
        ('{"prompt": "a", "guidance_scale": NaN}', ["guidance_scale = nan", "finite"]),
        ('{"prompt": "a", "seed": 1e400}', ["seed = inf"]),
        ('{"prompt": "a", "seed": 9223372036854775808}', ["seed = 9223372036854775808", "less than or equal"]),
        ('{"prompt": "a", "output_format": "bmp"}', ["output_format = 'bmp'", "'png', 'jpeg' or 'webp'"]),
        ('{"prompt": "a", "enable_cache_dit": "on"}', ["enable_cache_dit = 'on'", "a valid boolean"]),
        ('{"prompt": ""}', ["prompt = ''"]),
        ('{"width": 3}', ["prompt is missing"]),
        ("{", ["not valid JSON"]),
        ("[]", ["not an object"]),
    ],
)
def test_a_body_that_does_not_fit_is_400_in_one_line(app, body, words):
    answer = TestClient(app).post("/generate", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert len(answer.json()["detail"].splitlines()) == 1
    for word in words:
        assert word in answer.json()["detail"]


def report(cached=4, **changes):
    return {
        "enabled": True, "reason": None, "config": {"forecast": {}}, "computed_steps": 8, "cached_steps": cached,
    } | changes


def test_the_last_fifty_requests_are_kept_and_news_are_counted_from_a_number(app):
    result = type("Result", (), {"metrics": type("Metrics", (), {"cache_dit": report()})()})()
    for number in range(60):
        responses.add_report({}, {}, f"id-{number}", result)
    ask = TestClient(app)
    everything = ask.get("/v1/cache_dit/requests").json()
    assert [entry["n"] for entry in everything["requests"]] == list(range(11, 61))
    assert everything["last"] == 60 and everything["speed_up"] == 1.5
    assert everything["totals"]["cached_requests"] == 60
    assert "config" not in everything["requests"][0]["report"]
    assert everything["requests"][0] | {"time": 0} == everything["requests"][0] | {
        "time": 0, "id": "id-10", "outputs": 1, "speed_up": 1.5,
    }
    news = ask.get("/v1/cache_dit/requests", params={"since": 58}).json()
    assert [entry["id"] for entry in news["requests"]] == ["id-58", "id-59"]
    assert ask.get("/v1/cache_dit/requests", params={"since": -1}).status_code == 400


def test_outputs_that_ran_by_themselves_are_one_request():
    ring = state.History()
    ring.add("id", report() | {"outputs": [report(), report(5)]})
    [entry] = ring.since(0)["requests"]
    assert entry["outputs"] == 2 and "outputs" not in entry["report"]


def test_the_speed_up_is_a_bound_and_none_without_steps():
    assert state.speed_up(7, 5) == pytest.approx(12 / 7, abs=1e-3)
    assert state.speed_up(0, 0) is None


def test_the_page_is_one_file_and_its_policy_lets_nothing_else_in(app):
    answer = TestClient(app).get("/cache_dit")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:)|https?:|//[a-z]+\.|@import|url\(", answer.text)
    assert "innerHTML" not in answer.text and "width=device-width" in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "'unsafe-eval'" not in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]


def test_openapi_describes_bodies_and_answers(app):
    described = app.openapi()
    operation = described["paths"]["/generate"]["post"]
    assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/GenerateRequest")
    assert operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/GenerateResponse")
    assert "4XX" in operation["responses"] and "422" not in operation["responses"]
    models = described["components"]["schemas"]
    assert {"prompt", "seed", "profile", "warmup"} <= models["GenerateRequest"]["properties"].keys()
    assert models["GenerateRequest"]["required"] == ["prompt"]
    assert {"images", "time_cost", "cache_stats", "seed", "notes"} <= models["GenerateResponse"]["properties"].keys()
    assert {"/cache_dit", "/v1/cache_dit/requests"} <= described["paths"].keys()


@pytest.fixture
def address():
    """A server that refuses: one address answers 401, every other 404."""
    app = FastAPI()

    @app.post("/guarded/generate")
    async def guarded(request: generate.Request):
        raise generate.HTTPException(401, f"no entry for {request.headers.get('authorization')}")

    @app.post("/other/generate")
    async def other():
        return {"text": "hello"}

    with serving(app) as address:
        yield f"http://{address}"


def test_the_client_says_in_one_line_what_a_server_refused(address):
    for path, words in {
        "guarded": "401: no entry for Bearer secret", "nothing": "404: Not Found", "other": "no POST /generate",
    }.items():
        with pytest.raises(client.ClientError, match=words):
            client.ask(f"{address}/{path}", {"prompt": "a"}, key="secret", timeout=10)


def test_the_client_says_in_one_line_that_nobody_answers():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(client.ClientError, match="onnect"):
            client.ask(f"http://127.0.0.1:{unused.getsockname()[1]}", {"prompt": "a"}, key=None, timeout=10)
    with pytest.raises(client.ClientError):
        client.ask("nowhere", {"prompt": "a"}, key=None, timeout=10)
