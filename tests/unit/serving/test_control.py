"""``/v1/cache_dit`` without a server: all replicas or none, who may change what, and what OpenAPI says."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY

from sglang_cachedit_plugin.config import effective
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.config.settings import KNOBS
from sglang_cachedit_plugin.config.sources import CONTROL_KEY_VARIABLE, MAX_CHANGE_BYTES, read_file, read_overrides
from sglang_cachedit_plugin.errors import SettingError
from sglang_cachedit_plugin.integration import sglang_api
from sglang_cachedit_plugin.report import metrics
from sglang_cachedit_plugin.serving import channel, control, state

ADDRESS = "/v1/cache_dit"
SERVER_ARGS = SimpleNamespace(cache_dit_config=None, backend="sglang")


class Replicas:
    """Workers of the test: each holds settings of its own; ``broken`` ones do not answer."""

    def __init__(self, count: int):
        self.own = [Defaults(file=effective.current().file) for _ in range(count)]
        self.broken: set[int] = set()
        self.messages: list[dict] = []
        self.wait: asyncio.Event | None = None

    async def tell(self, message):
        self.messages.append(json.loads(message.text))
        if self.wait is not None:
            await self.wait.wait()
        return [self._answer(number, message.text) for number in range(len(self.own))]

    def _answer(self, number: int, text: str):
        if number in self.broken:
            return TimeoutError("Scheduler did not respond in time.")
        http = effective.current()
        effective.install(self.own[number])
        try:
            return channel.handle(SERVER_ARGS, text)
        finally:
            self.own[number] = effective.current()
            effective.install(http)


class Unordered(Replicas):
    """Workers that take 0.1 s to hear of a change; their word on how they are is said at once and arrives late."""

    def __init__(self, count: int, late: float):
        super().__init__(count)
        self.late = late

    async def tell(self, message):
        shown = json.loads(message.text)["do"] == "show"
        if not shown:
            await asyncio.sleep(0.1)
        answers = await super().tell(message)
        if shown:
            await asyncio.sleep(self.late)
        return answers


@pytest.fixture(autouse=True)
def start_up(monkeypatch):
    monkeypatch.delenv(CONTROL_KEY_VARIABLE, raising=False)
    monkeypatch.setattr(effective, "_current", Defaults(file=read_file({"cache_config": {"max_warmup_steps": 3}})))
    monkeypatch.setattr(sglang_api, "answer", lambda output, error=None: SimpleNamespace(output=output, error=error))
    monkeypatch.setattr(sglang_api, "gather_replica", lambda value: [value])
    monkeypatch.setattr(state, "_current", state.ServerState())
    monkeypatch.setattr(state, "PATIENCE_S", 0.2)


@pytest.fixture
def replicas(monkeypatch):
    made = Replicas(2)
    monkeypatch.setattr(sglang_api, "tell_replicas", made.tell)
    return made


def client(address: str = "127.0.0.1", disagg: object = None, **server_args) -> TestClient:
    app = FastAPI()
    app.state.server_args, app.state.disagg_server = SimpleNamespace(**server_args), disagg
    state.install(app, state.current())
    app.include_router(control.router)
    return TestClient(app, client=(address, 5000))


def test_a_change_reaches_every_replica_and_delete_takes_it_back(replicas):
    start = client().get(ADDRESS).json()
    answer = client().put(ADDRESS, json={"enabled": False, "max_warmup_steps": 6})
    state = answer.json()
    assert answer.status_code == 200
    assert state["enabled"] == {"value": False, "origin": "control"}
    assert state["config"]["max_warmup_steps"] == {"value": 6, "origin": "control.max_warmup_steps"}
    assert state["control"] == {"enabled": False, "max_warmup_steps": 6}
    assert state["workers"]["consistent"] and len(state["workers"]["replicas"]) == 2
    assert [own.decide(None, None).enabled for own in replicas.own] == [False, False]
    again = client().delete(ADDRESS).json()
    assert {**again, "workers": None, "changed": None} == {**start, "workers": None}
    assert {own.fingerprint() for own in replicas.own} == {effective.current().fingerprint()}


def test_a_change_replaces_the_one_before(replicas):
    client().put(ADDRESS, json={"max_warmup_steps": 6, "enabled": False})
    state = client().put(ADDRESS, json={"Fn_compute_blocks": 2}).json()
    assert state["config"]["max_warmup_steps"]["value"] == 3
    assert state["enabled"]["value"] is True


def test_a_patch_changes_one_thing_and_keeps_the_rest(replicas):
    client().put(ADDRESS, json={
        "enabled": False, "cache_config": {"scm_preset": "fast"}, "secondary": {"max_warmup_steps": 2},
    })
    state = client().patch(ADDRESS, json={"max_warmup_steps": 6, "secondary": {"Fn_compute_blocks": 2}}).json()
    assert state["control"] == {
        "enabled": False, "scm_preset": "fast", "max_warmup_steps": 6,
        "secondary": {"max_warmup_steps": 2, "Fn_compute_blocks": 2},
    }
    assert state["changed"]["max_warmup_steps"] == {"before": 3, "now": 6} and "enabled" not in state["changed"]
    # Null takes back, whatever the setting was called.
    state = client().patch(ADDRESS, json={"enabled": None, "steps_computation_mask": None}).json()
    assert state["enabled"]["value"] is True and state["config"]["steps_computation_mask"]["value"] is None
    assert {own.fingerprint() for own in replicas.own} == {effective.current().fingerprint()}
    refused = client().patch(ADDRESS, json={"max_warmup_stepz": None})
    assert refused.status_code == 400 and "did you mean" in refused.json()["detail"]


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(sglang_api, "logger", lambda: SimpleNamespace(info=lines.append, error=lines.append))
    return lines


def test_a_change_says_who_changed_what(replicas, said):
    changed = client().put(ADDRESS, json={"enabled": False, "max_warmup_steps": 6}).json()["changed"]
    assert changed == {"enabled": {"before": True, "now": False}, "max_warmup_steps": {"before": 3, "now": 6}}
    client().put(ADDRESS, json={"enabled": False, "max_warmup_steps": 6})
    client().delete(ADDRESS)
    client("10.0.0.9").delete(ADDRESS)
    client().put(ADDRESS, json={"max_warmup_stepz": 1})
    assert client().get(ADDRESS).json()["changed"] is None
    start = f"cache-dit: {{}} {ADDRESS} from {{}}"
    assert said == [
        start.format("PUT", "127.0.0.1") + ": enabled True -> False, max_warmup_steps 3 -> 6",
        start.format("PUT", "127.0.0.1") + ": nothing changed",
        start.format("DELETE", "127.0.0.1") + ": enabled False -> True, max_warmup_steps 6 -> 3",
        start.format("DELETE", "10.0.0.9")
        + f" refused (403): the client is at 10.0.0.9: without {CONTROL_KEY_VARIABLE} only clients on the "
        "server's machine may do this; set it there, and send it as the header Authorization: Bearer KEY",
        start.format("PUT", "127.0.0.1")
        + " refused (400): max_warmup_stepz = 1 (control): unknown key; did you mean 'max_warmup_steps'?",
    ]


def test_workers_that_could_not_be_brought_back_are_on_the_metrics(replicas, monkeypatch):
    made = state.ServerState(counting=True)
    monkeypatch.setattr(state, "_current", made)

    def agree() -> float | None:
        return REGISTRY.get_sample_value(metrics.AGREE)

    client().put(ADDRESS, json={"max_warmup_steps": 6})
    assert agree() == 1.0
    replicas.broken = {1}
    assert client().put(ADDRESS, json={"max_warmup_steps": 9}).status_code == 503
    assert agree() == 0.0
    replicas.broken = set()
    client().delete(ADDRESS)
    assert agree() == 1.0


def test_where_a_replica_fails_all_keep_the_old_settings(replicas):
    client().put(ADDRESS, json={"max_warmup_steps": 6})
    before = effective.current().fingerprint()
    replicas.broken = {1}
    answer = client().put(ADDRESS, json={"max_warmup_steps": 9})
    assert answer.status_code == 503
    assert "replica 1" in answer.json()["detail"]
    assert {own.fingerprint() for own in replicas.own} == {before} == {effective.current().fingerprint()}
    assert [message["settings"] for message in replicas.messages[-2:]] == [
        {"max_warmup_steps": 9}, {"max_warmup_steps": 6},
    ]


def test_a_worker_that_refuses_is_all_workers_refusing(replicas):
    # The worker's file knows no profile of that name: its file was changed after the start.
    monkey = Defaults(file=read_file({"profiles": {"draft": {}}}))
    effective.install(monkey)
    answer = client().put(ADDRESS, json={"profile": "draft"})
    assert answer.status_code == 503
    assert "profile = 'draft'" in answer.json()["detail"]
    assert effective.current().overrides.given is None


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        (b'{"max_warmup_stepz": 1}', 400, "did you mean 'max_warmup_steps'"),
        (b'{"enabled": true, "residual_diff_threshold": 7}', 400, "from 0 to 1"),
        (b"", 400, "not valid JSON"),
        (b'{"enabled": true, "enabled": false}', 400, "given twice"),
        (b"{" + b" " * MAX_CHANGE_BYTES + b"}", 413, "larger than 65536 bytes"),
    ],
)
def test_a_bad_change_is_refused_whole_and_no_worker_hears_of_it(replicas, body, status, part):
    before = effective.current()
    answer = client().put(ADDRESS, content=body)
    assert answer.status_code == status
    assert part in answer.json()["detail"]
    assert len(answer.json()["detail"].splitlines()) == 1
    assert replicas.messages == [] and effective.current() is before


def test_the_largest_body_is_taken(replicas):
    body = b'{"max_warmup_steps": 6' + b" " * (MAX_CHANGE_BYTES - 23) + b"}"
    assert len(body) == MAX_CHANGE_BYTES
    assert client().put(ADDRESS, content=body).status_code == 200


def test_get_does_not_wait_for_a_busy_worker(replicas):
    client().put(ADDRESS, json={"max_warmup_steps": 6})
    replicas.wait = asyncio.Event()
    state = client().get(ADDRESS).json()
    assert state["workers"]["age_s"] > 0.1
    assert state["config"]["max_warmup_steps"]["value"] == 6


@pytest.mark.parametrize("late", [0.0, 0.15], ids=["arrives before", "arrives after"])
def test_what_workers_said_before_a_change_is_not_shown_after_it(monkeypatch, late):
    made = Unordered(2, late)
    monkeypatch.setattr(sglang_api, "tell_replicas", made.tell)

    app = FastAPI()
    state.install(app, state.current())
    asked = Request({"type": "http", "method": "PUT", "path": ADDRESS, "headers": [], "client": None, "app": app})

    async def both():
        await asyncio.gather(control._install(asked, {"max_warmup_steps": 6}), state.current().workers.ask())

    asyncio.run(both())
    assert [message["do"] for message in made.messages] == ["show", "set"]
    assert state.current().workers.describe()["consistent"]


def test_a_change_that_arrives_after_a_later_one_is_not_made(replicas):
    late = {"do": "set", "settings": {"max_warmup_steps": 9}, "number": 1}
    client().put(ADDRESS, json={"max_warmup_steps": 6})
    client().put(ADDRESS, json={"max_warmup_steps": 7})
    answer = replicas._answer(0, json.dumps(late))
    assert answer.output is None and "change 1 came after change 2" in answer.error
    assert client().get(ADDRESS).json()["workers"]["consistent"]


def test_workers_that_never_answered_are_null(replicas):
    replicas.broken = {0}
    assert client().get(ADDRESS).json()["workers"] is None


def test_a_worker_with_other_settings_is_seen(replicas):
    client().put(ADDRESS, json={"max_warmup_steps": 6})
    replicas.own[1] = Defaults()
    assert client().get(ADDRESS).json()["workers"]["consistent"] is False


def test_roles_that_run_apart_are_not_changed(replicas):
    apart = client(disagg=object())
    assert apart.put(ADDRESS, json={}).status_code == apart.delete(ADDRESS).status_code == 501
    assert apart.get(ADDRESS).json()["workers"] is None
    assert replicas.messages == []


CHANGES = [("PUT", {"content": b"{}"}), ("PATCH", {"content": b"{}"}), ("DELETE", {})]


@pytest.mark.parametrize(("method", "body"), CHANGES)
@pytest.mark.parametrize("key_of", ["host", "variable"])
def test_a_key_is_needed_where_there_is_one(replicas, monkeypatch, method, body, key_of):
    if key_of == "host":
        guarded = client("10.0.0.9", api_key="secret")
        monkeypatch.setenv(CONTROL_KEY_VARIABLE, "another")
    else:
        guarded = client("10.0.0.9")
        monkeypatch.setenv(CONTROL_KEY_VARIABLE, "secret")
    for given in ("", "Bearer", "Bearer secre", "Basic secret", "secret"):
        refused = guarded.request(method, ADDRESS, headers={"Authorization": given}, **body)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert "the header Authorization " + ("has another" if given else "is missing") in refused.json()["detail"]
        assert "secret" not in refused.text
    assert replicas.messages == []
    good = {"Authorization": "Bearer secret"}
    assert guarded.request(method, ADDRESS, headers=good, **body).status_code == 200


@pytest.mark.parametrize(("method", "body"), CHANGES)
@pytest.mark.parametrize(
    ("address", "headers", "status"),
    [
        ("127.0.0.1", {}, 200),
        ("::1", {}, 200),
        ("::ffff:127.0.0.1", {}, 200),
        ("127.0.0.1", {"Origin": "http://localhost:30000"}, 200),
        ("127.0.0.1", {"Origin": "http://pictures.example"}, 403),
        ("127.0.0.1", {"Origin": "null"}, 403),
        ("127.0.0.1", {"X-Forwarded-For": "127.0.0.1"}, 403),
        ("127.0.0.1", {"Forwarded": "for=10.0.0.9"}, 403),
        ("10.0.0.9", {}, 403),
        ("testclient", {}, 403),
    ],
)
def test_without_a_key_only_this_machine_may_change_anything(replicas, method, body, address, headers, status):
    answer = client(address).request(method, ADDRESS, headers=headers, **body)
    assert answer.status_code == status
    assert status == 200 or f"the header {next(iter(headers), 'Authorization')}" in answer.json()["detail"]
    assert client(address).get(ADDRESS).status_code == 200


def test_openapi_describes_all_of_it():
    document = client().get("/openapi.json").json()
    methods = document["paths"][ADDRESS]
    assert set(methods) == {"get", "put", "patch", "delete"}
    body = methods["put"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(KNOBS) | {"enabled", "profile", "cache_config", "secondary", "profiles"} <= set(body["properties"])
    assert "$defs" not in json.dumps(body)
    assert {"200", "400", "401", "403", "413", "503"} <= set(methods["put"]["responses"])
    assert set(document["components"]["schemas"]["State"]["properties"]) >= {"config", "workers", "totals", "control"}


def test_null_takes_a_setting_back_in_a_patch_and_is_no_setting_in_a_put():
    import jsonschema

    methods = client().get("/openapi.json").json()["paths"][ADDRESS]
    put, patch = (
        jsonschema.Draft202012Validator(methods[name]["requestBody"]["content"]["application/json"]["schema"])
        for name in ("put", "patch")
    )
    for body in ({"max_warmup_steps": None}, {"secondary": {"scm_policy": None}}, {"cache_config": {"lockstep": None}}):
        assert patch.is_valid(body) and not put.is_valid(body)
        with pytest.raises(SettingError, match="expected"):
            read_overrides(body)
    assert not patch.is_valid({"max_warmup_steps": "2"})


def test_the_schema_takes_what_the_checks_take():
    import jsonschema

    schema = client().get("/openapi.json").json()["paths"][ADDRESS]["put"]["requestBody"]["content"][
        "application/json"
    ]["schema"]
    good = {
        "enabled": True, "profile": "fast", "cache_config": {"scm_preset": "fast", "dmd_rank": 3},
        "secondary": {"max_warmup_steps": 2}, "profiles": {"mine": {"scm_compute_bins": [3, 1], "scm_cache_bins": "2"}},
    }
    jsonschema.validate(good, schema)
    for bad in ({"enabled": "yes"}, {"max_warmup_steps": -1}, {"scm_preset": "fsat"}, {"x": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)


def test_a_message_of_another_kind_goes_its_own_way():
    handled = channel.dispatch(lambda scheduler, request: ("host", request), object(), "a request")
    assert handled == ("host", "a request")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"do": "set"}', '{"do": "set", "number": 1}', '{"do": "set", "settings": 3, "number": 1}']
)
def test_a_message_that_makes_no_sense_changes_nothing(text):
    before = effective.current()
    answer = channel.handle(SERVER_ARGS, text)
    assert answer.output is None and answer.error
    assert effective.current() is before


def test_one_rank_that_refuses_stops_all_of_its_replica(monkeypatch):
    monkeypatch.setattr(sglang_api, "gather_replica", lambda value: [value, "rank 1: no"])
    before = effective.current()
    answer = channel.handle(SERVER_ARGS, '{"do": "set", "settings": {"max_warmup_steps": 6}, "number": 1}')
    assert answer.error == "rank 1: no"
    assert effective.current() is before
