"""Whatever stands in a change, a request or the environment: it is used, or refused in one line and changes nothing."""

from __future__ import annotations

import json

import pytest
from fastapi import HTTPException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_cachedit_plugin.config import effective
from sglang_cachedit_plugin.config.settings import ALIASES, KNOBS
from sglang_cachedit_plugin.config.sources import MAX_CHANGE_BYTES, PREFIX, SECONDARY_VARIABLES, VARIABLES
from sglang_cachedit_plugin.integration import sglang_api, startup
from sglang_cachedit_plugin.serving import validation
from tests.unit.serving.test_control import ADDRESS, client, replicas, start_up

__all__ = ["replicas", "start_up"]

IN_CI = settings(
    deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
TEXTS = st.sampled_from(["", "../../etc/passwd", "fast", "static", "none", "nan", "\ud800", "ü", "a\nb", "\x1b[2J"])
NUMBERS = st.sampled_from([True, False, 0, 1, -1, 2**63, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan")])
JSON = st.recursive(
    st.none() | TEXTS | NUMBERS | st.integers(-2, 12) | st.floats(-1, 2),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS | st.sampled_from([*KNOBS]), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from([
    *KNOBS, *ALIASES, "enabled", "profile", "profiles", "secondary", "cache_config", "cache_dit_config", "path",
])
BODIES = st.dictionaries(KEYS | TEXTS, JSON, max_size=4) | JSON
RAW = st.binary(max_size=40) | st.sampled_from([
    b"", b"{", b"[" * 60_000, b'{"a":' * 10_000, b"9" * 6000, b'{"max_warmup_steps": 1e999}', b"\xff\xfe{}", b"NaN",
    b'{"enabled": true, "enabled": true}', b"\xef\xbb\xbf{}", b'{"a": "\\ud800"}', b"{}" + b" " * MAX_CHANGE_BYTES,
    b"'{}'",
    b'{"profiles": {"\\ud800": {}}}', b'{"profiles": {"": {}}}', b'{"profiles": {"a\\u0000": {}}}', b"null", b"--",
    b'{' + b",".join(b'"k%d": 1' % n for n in range(5000)) + b', "k4999": 1}',
])


@pytest.fixture
def state():
    """What GET shows, without what time alone changes."""
    http = client()

    def read() -> dict:
        answer = http.get(ADDRESS)
        assert answer.status_code == 200
        return {key: value for key, value in answer.json().items() if key != "workers"}

    return read


def one_line(text: str) -> bool:
    return text.isprintable() and len(text) <= 2000 and bool(text.encode("utf-8"))


def _sent(content: bytes, state, replicas) -> int:
    http, before = client(), state()
    answer = http.put(ADDRESS, content=content)
    if answer.status_code == 200:
        assert state()["control"] == json.loads(content)
        http.delete(ADDRESS)
    else:
        assert answer.status_code in (400, 413)
        assert one_line(answer.json()["detail"])
    assert state() == before
    assert {own.fingerprint() for own in replicas.own} == {effective.current().fingerprint()}
    return answer.status_code


@settings(IN_CI, max_examples=250)
@given(body=BODIES)
def test_any_change_is_made_whole_or_refused(body, state, replicas):
    _sent(json.dumps(body).encode(), state, replicas)


@settings(IN_CI, max_examples=120)
@given(content=RAW)
def test_any_bytes_are_refused_or_a_change(content, state, replicas):
    _sent(content, state, replicas)


@pytest.mark.parametrize("content", [
    b'{"cache_dit_config": "../../etc/passwd"}', b'{"profiles": {"\\ud800": {}}}', b'{"max_warmup_steps": true}',
    b'{"residual_diff_threshold": NaN}', b'{"residual_diff_threshold": 1e999}', b'[' * 50_000, b'{"enabled": 1}',
])
def test_what_must_be_refused(content, state, replicas):
    assert _sent(content, state, replicas) == 400


@settings(IN_CI, max_examples=300)
@given(enable=JSON | st.none(), params=BODIES)
def test_any_request_is_taken_or_answered_with_400(enable, params):
    before = effective.current()
    refusal = None
    try:
        validation.check("id", enable_cache_dit=enable, cache_dit_params=params)
    except HTTPException as error:
        refusal = error
    assert effective.current() is before
    if refusal is not None:
        assert refusal.status_code == 400 and one_line(refusal.detail)


VARIABLE = st.sampled_from(["ENABLED", "CONTROL_KEY", "", "WARMPU", "SECONDARY_", "enabled"]).map(PREFIX.__add__)
NAMES = st.sampled_from([*VARIABLES, *SECONDARY_VARIABLES]) | VARIABLE | st.text(max_size=8).map(PREFIX.__add__)
VALUES = st.text(max_size=12) | TEXTS | st.sampled_from(["true", "0", "-4", "1e999", "8,3", "9" * 6000, "0.2", "٣"])


@settings(IN_CI, max_examples=400)
@given(environment=st.dictionaries(NAMES, VALUES, min_size=1, max_size=4))
def test_any_environment_is_taken_or_ends_the_start_in_one_line(environment, monkeypatch, capsys):
    before = effective.current()
    monkeypatch.setattr(startup, "read_environment", lambda **given: _read(environment, **given))
    monkeypatch.setattr(sglang_api, "known_variables", lambda: ())
    status = 0
    try:
        startup.read_settings()
    except SystemExit as left:
        status = left.code
    if status:
        line = capsys.readouterr().err.removesuffix("\n")
        assert status == 2 and line.startswith("cache-dit: error: ") and one_line(line)
        assert effective.current() is before
        return
    assert json.dumps(effective.current().describe(), ensure_ascii=False).encode()
    effective.install(before)


def _read(environment, host_variables):
    from sglang_cachedit_plugin.config.sources import read_environment

    return read_environment(environment, host_variables)
