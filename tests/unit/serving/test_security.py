"""What comes over HTTP is limited, names no files, and cannot pose as something else in logs and metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
from types import SimpleNamespace

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sglang_cachedit_plugin.config.sources import CONTROL_KEY_VARIABLE, MAX_CHANGE_BYTES, read_file
from sglang_cachedit_plugin.errors import SettingError
from sglang_cachedit_plugin.integration import sglang_api, startup
from sglang_cachedit_plugin.report import metrics
from sglang_cachedit_plugin.report.stats import RequestStats, TransformerStats
from sglang_cachedit_plugin.serving import auth, control, generate, page, state, validation
from sglang_cachedit_plugin.serving.generate_models import TEXTS, GenerateRequest
from tests.unit.serving.test_control import ADDRESS, client, replicas, start_up

__all__ = ["replicas", "start_up"]

FORGED = 'x\n2026-11-21 INFO all is well\r\x1b[2J\u2028"} 9\\'


def app() -> FastAPI:
    made = FastAPI()
    made.state.server_args, made.state.disagg_server = SimpleNamespace(), None
    state.install(made, state.ServerState())
    for router in (control.router, page.router, generate.router):
        made.include_router(router)
    return made


def endless(made: FastAPI, method: str, path: str, start: bytes, part: bytes) -> tuple[int, str, int]:
    """Status, detail, and how many bytes were taken of a body that never ends and whose length nobody announced."""
    taken, sent = 0, []

    async def receive():
        nonlocal taken
        body = start if taken == 0 else part
        taken += len(body)
        assert taken < 100 << 20, "nobody stops reading"
        return {"type": "http.request", "body": body, "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "root_path": "", "scheme": "http", "query_string": b"",
        "client": ("127.0.0.1", 5000), "server": ("127.0.0.1", 80),
        "headers": [(b"content-type", b"application/json"), (b"transfer-encoding", b"chunked")],
    }
    asyncio.run(made(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], json.loads(body)["detail"], taken


@pytest.mark.parametrize(("method", "path", "limit"), [
    ("PUT", ADDRESS, MAX_CHANGE_BYTES), ("POST", "/generate", validation.MAX_BYTES),
])
def test_a_body_without_end_is_read_up_to_the_limit(replicas, method, path, limit):
    status, detail, taken = endless(app(), method, path, b'{"prompt": "', b"a" * 4096)
    assert (status, detail) == (413, f"the body is larger than {limit} bytes")
    assert limit < taken <= limit + 4096
    assert replicas.messages == []


def test_a_large_body_within_the_limit_arrives_whole():
    made = APIRouter(route_class=validation.OneLineRoute)

    @made.post("/echo")
    async def echo(body: dict[str, str]) -> int:
        return len(body["prompt"])

    app = FastAPI()
    app.include_router(made)
    assert TestClient(app).post("/echo", json={"prompt": "a" * (4 << 20)}).status_code == 413
    answer = TestClient(app).post("/echo", json={"prompt": "a" * (3 << 20)})
    assert (answer.status_code, answer.json()) == (200, 3 << 20)


@pytest.mark.parametrize("body", [
    "[" * 100_000, '{"prompt": ' + '{"a":' * 50_000, '{"prompt": "a", "width": ' + "9" * 6000 + "}",
    '{"prompt": "a", "width": 1e999}', '{"prompt": "a", "seed": 1' + "0" * 400 + "}",
    '{"prompt": "\\ud800", "width": "\\ud800"}',
    '{"prompt": "a", "profile": ' + "[" * 900 + "]" * 900 + "}",
])
def test_a_body_that_is_made_to_hurt_is_400_in_one_line(body):
    answer = TestClient(app()).post("/generate", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["detail"].isprintable() and len(answer.json()["detail"]) <= 2000


def test_settings_in_settings_in_settings_are_400_in_one_line():
    deep = json.loads('{"a":' * 900 + "1" + "}" * 900)
    with pytest.raises(generate.HTTPException) as caught:
        validation.check("id", cache_dit_params=deep)
    assert caught.value.status_code == 400 and caught.value.detail.isprintable() and len(caught.value.detail) <= 2000


def test_keys_are_compared_in_constant_time(replicas, monkeypatch):
    compared = []

    def compare(given, own):
        compared.append((given, own))
        return hmac.compare_digest(given, own)

    monkeypatch.setenv(CONTROL_KEY_VARIABLE, "secret")
    monkeypatch.setattr(auth, "hmac", SimpleNamespace(compare_digest=compare))
    statuses = [
        client("10.0.0.9").put(ADDRESS, json={}, headers={"Authorization": f"{scheme} {key}"}).status_code
        for scheme, key in (("Bearer", "secreT"), ("Bearer", "s"), ("bearer", "secret"), ("Basic", "secret"))
    ]
    assert statuses == [401, 401, 200, 401]
    assert compared == [(key, b"secret") for key in (b"secreT", b"s", b"secret")]


@pytest.mark.parametrize("header", ["Via", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP"])
def test_what_came_through_a_proxy_is_not_from_this_machine(replicas, header):
    assert client().put(ADDRESS, json={}, headers={header: "localhost"}).status_code == 403


def fit(**fields):
    body = GenerateRequest.model_validate({"prompt": "a"} | fields)
    return generate.fit(body, video=True, taken=None, extra=frozenset(fields))


@pytest.mark.parametrize("value", [
    "/etc/passwd", "x.json", {"action": "/etc/passwd"}, [[1, 2], ["/etc/passwd"]], [{"source": {"url": "http://a/b"}}],
])
def test_text_that_may_name_a_file_does_not_reach_the_model(value):
    arguments, notes = fit(action=value)
    assert "action" not in arguments
    assert notes == ["action was left out: text in it may name a file, and files are not taken here"]


def test_numbers_and_texts_that_are_no_places_reach_it():
    given = {"action": [[0.5, 1], [2, 3.0]], "high_motion": True, "preset": "fast/8", "segments": [{"caption": "a/b"}]}
    arguments, notes = fit(**given)
    assert {name: arguments[name] for name in given} == given and notes == []
    assert not {name for name in TEXTS if "path" in name or "url" in name}


def test_a_line_of_the_log_stays_one_line(replicas, monkeypatch, capsys):
    stats = RequestStats(backend="native", enabled=True, notes=[FORGED])
    stats.transformers[FORGED] = TransformerStats(steps=1, notes=[FORGED])
    logged = []
    logger = SimpleNamespace(
        error=lambda text, *values: logged.append(text % values), info=lambda text: logged.append(text)
    )
    monkeypatch.setattr(sglang_api, "logger", lambda: logger)

    async def tell(message):
        return [SimpleNamespace(output=None, error=FORGED)]

    monkeypatch.setattr(sglang_api, "tell_replicas", tell)
    answer = client().put(ADDRESS, json={})
    monkeypatch.setattr(startup, "ensure_file", lambda server_args, anew: (FORGED,))
    capsys.readouterr()  # what libraries log of the request is not asked about
    startup.check(SimpleNamespace(cache_dit_config=None, enable_breakable_cuda_graph=False))
    printed = capsys.readouterr().err.removesuffix("\n").split("\n")
    [warned] = [line for line in printed if "all is well" in line or line.startswith("cache-dit")]
    assert answer.status_code == 503
    error = SettingError(FORGED, FORGED, FORGED, FORGED)
    lines = [stats.line(FORGED), *logged, warned, answer.json()["detail"], str(error)]
    assert len(lines) == 6
    for line in lines:
        assert line.isprintable() and "all is well" in line


def test_a_profile_cannot_be_called_what_is_not_one_line(replicas):
    answer = client().put(ADDRESS, json={"profiles": {FORGED: {}}})
    assert answer.status_code == 400 and answer.json()["detail"].isprintable()
    with pytest.raises(SettingError):
        read_file({"profiles": {FORGED: {}}})


def test_a_branch_cannot_forge_metrics(monkeypatch):
    monkeypatch.setattr(metrics, "_branches", set())
    stats = RequestStats(backend="diffusers", enabled=True)
    stats.transformers["forging"] = TransformerStats(steps=1)
    stats.transformers["forging"].branch(FORGED).record(0, False)
    metrics.observe(stats.as_dict())
    text = generate_latest().decode()
    assert not [line for line in text.split("\n") if line.startswith("2026")]
    samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
    own = {(each.labels["branch"], each.labels["kind"]): each.value for each in samples
           if each.name == metrics.STEPS and each.labels["transformer"] == "forging"}
    assert own == {(FORGED, "computed"): 1.0, (FORGED, "cached"): 0.0}
