"""Bad requests to a real server: 400 in one line, the settings stay, and the next picture is the same as before."""

from __future__ import annotations

import json
from collections import Counter

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

ADDRESS = "/v1/cache_dit"
PICTURE = {
    "prompt": "red apple", "size": "64x64", "num_inference_steps": 8, "seed": 1, "output_format": "png",
    "response_format": "b64_json", "enable_cache_dit": True, "cache_dit_params": {"residual_diff_threshold": 0.9},
}
BATCH = settings(
    deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
sent: Counter[str] = Counter()


class Watched:
    """A server, what it drew and which settings it had before anything bad came."""

    def __init__(self, url: str):
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=120)
        self.before = self.look()

    def look(self) -> tuple[str, dict]:
        """The control picture, and the settings without what every request moves."""
        answer = self.http.post("/v1/images/generations", json=PICTURE)
        assert answer.status_code == 200, answer.text
        state = self.http.get(ADDRESS).json()
        return answer.json()["data"][0]["b64_json"], {k: v for k, v in state.items() if k not in ("workers", "totals")}

    def refused(self, kind: str, answer: httpx.Response) -> bool:
        """Whether an answer is a refusal; anything else than that and success fails."""
        sent[kind] += 1
        if answer.status_code == 200:
            return False
        assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:500])
        assert "Traceback" not in answer.text
        if answer.status_code not in (404, 405):
            detail = answer.json()["detail"]
            assert isinstance(detail, str) and detail.isprintable() and len(detail) <= 2100, detail
        return True


@pytest.fixture(scope="module")
def watched(server):
    """The shared server; counts of what was sent are printed with ``-s``."""
    made = Watched(server)
    yield made
    print(f"\nbad requests sent: {dict(sent)}, {sent.total()} in all")


@pytest.fixture(autouse=True)
def as_before(watched):
    """After each batch everything is as it was."""
    yield
    assert watched.look() == watched.before


@pytest.fixture(scope="module")
def described(server):
    """The server's own description of its addresses."""
    return schemathesis.openapi.from_url(f"{server}/openapi.json")


def tame(body):
    """Whatever of a generated body is right is made cheap: what is tested is the rest."""
    small = {"width": 64, "height": 64, "num_inference_steps": 2, "n": 1, "num_frames": 1}
    if not isinstance(body, dict):
        return body
    # What is left out would be the model's own default: a large picture in many steps. A picture of a few pixels is
    # nothing that the model can draw.
    least = {"width": 1, "height": 1}
    return small | {
        key: small[key] if key in small and type(value) is int and value >= least.get(key, small[key]) else value
        for key, value in body.items()
        if value is not None or key not in small
    }


def call(watched: Watched, case) -> httpx.Response:
    """Send a generated case as it is."""
    if case.path == "/generate":
        case.body = tame(case.body)
    return case.call(base_url=watched.url, session=None, timeout=120)


OPERATIONS = [
    ("PUT", ADDRESS, GenerationMode.NEGATIVE, 160), ("PUT", ADDRESS, GenerationMode.POSITIVE, 40),
    ("GET", ADDRESS + "/requests", GenerationMode.NEGATIVE, 60), ("POST", "/generate", GenerationMode.NEGATIVE, 160),
    ("POST", "/generate", GenerationMode.POSITIVE, 20),
]
CHECKS = [content_type_conformance, response_schema_conformance, status_code_conformance]


@pytest.mark.parametrize(("method", "path", "mode", "count"), OPERATIONS)
def test_what_the_description_allows_and_what_it_does_not(watched, described, method, path, mode, count):
    """No case brings a 5xx, and every answer is one that the description has."""

    @settings(BATCH, max_examples=count)
    @given(case=described[path][method].as_strategy(generation_mode=mode))
    def run(case):
        answer = call(watched, case)
        watched.refused(f"{method} {path} {mode.value}", answer)
        case.validate_response(answer, checks=CHECKS)
        if method == "PUT" and answer.status_code == 200:
            watched.http.delete(ADDRESS).raise_for_status()

    run()


RAW = [
    b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"prompt": "\xff"}', b"[" * 100_000, b'{"prompt":' * 20_000,
    b'{"prompt": "a", "seed": ' + b"9" * 6000 + b"}", b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "guidance_scale": NaN}', b'{"prompt": "a", "guidance_scale": 1e999}',
    b'{"prompt": "a", "width": true}', b'{"prompt": "a", "seed": 1.5}',
    b'{"prompt": "a", "cache_dit_params": "../../etc/passwd"}', b'{"prompt": "a", "cache_dit_params": {"\\ud800": 1}}',
    b'{"prompt": "a", "cache_dit_params": {"cache_dit_config": "../../etc/passwd"}}',
    b'{"prompt": "a", "cache_dit_params": {"profile": "../../etc/passwd"}}',
    b'{"prompt": "a", "enable_cache_dit": 1}', b'{"prompt": ["a"]}', b'{"prompt": ""}',
    b'{"prompt": "a", "cache_dit_params": {"max_warmup_steps": true}}',
    b'{"prompt": "a", "cache_dit_params": ' + b'{"secondary": ' * 500 + b"1" + b"}" * 501,
    b'{"prompt": "a", "cache_dit_params": {"steps_computation_mask": [' + b"1," * 20_000 + b"0]}}",
]


@pytest.mark.parametrize("path", ["/generate", ADDRESS])
def test_bodies_that_nobody_should_send(watched, path):
    send = watched.http.put if path == ADDRESS else watched.http.post
    for content in RAW:
        answer = send(path, content=content, headers={"content-type": "application/json"})
        assert watched.refused(f"raw {path}", answer), (content[:80], answer.text[:300])


def test_bodies_of_another_kind(watched):
    for kind in ("text/plain", "application/x-yaml", "multipart/form-data", "application/json; charset=latin-1"):
        answer = watched.http.post("/generate", content=b"prompt: a", headers={"content-type": kind})
        assert watched.refused("kind", answer)


def test_a_large_body_is_refused_and_not_kept(watched):
    for size in (70_000, 10 << 20):
        answer = watched.http.put(ADDRESS, content=b'{"profile": "' + b"x" * size + b'"}')
        assert watched.refused("large", answer) and answer.status_code == 413
    answer = watched.http.post("/generate", content=b'{"prompt": "' + b"x" * size + b'"}')
    assert watched.refused("large", answer) and answer.status_code == 413


def test_paths_are_not_taken_over_http(watched, tmp_path):
    file = tmp_path / "cache.yaml"
    file.write_text("cache_config: {max_warmup_steps: 1}\n")
    for field in ("cache_dit_config", "config", "path", "file"):
        for path in (str(file), "../../etc/passwd", f"file://{file}"):
            assert watched.refused("paths", watched.http.put(ADDRESS, json={field: path}))
            params = PICTURE | {"cache_dit_params": {field: path}}
            assert watched.refused("paths", watched.http.post("/v1/images/generations", json=params))
    body = {"prompt": "red apple", "width": 64, "height": 64, "num_inference_steps": 2, "cache_dit_config": str(file)}
    assert watched.refused("paths", watched.http.post("/generate", json=body))
    body["config"] = body.pop("cache_dit_config")
    answer = watched.http.post("/generate", json=body).json()
    assert any(note.startswith("config was left out") for note in answer["notes"])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5,
)
NAMES = st.sampled_from(["Fn_compute_blocks", "residual_diff_threshold", "scm_preset", "secondary", "profile"])


@settings(BATCH, max_examples=150)
@given(params=st.dictionaries(NAMES | st.text(max_size=6), VALUES.filter(lambda value: value is not None), min_size=1))
def test_settings_of_a_request(watched, params):
    # One name that nobody knows, so that no generated request is right and has to be drawn.
    content = json.dumps(PICTURE | {"cache_dit_params": {"unknown": 1, **params}}).encode()
    answer = watched.http.post(
        "/v1/images/generations", content=content, headers={"content-type": "application/json"}
    )
    assert watched.refused("settings of a request", answer)


@settings(BATCH, max_examples=60)
@given(switch=VALUES.filter(lambda value: value is not None and not isinstance(value, bool)))
def test_the_switch_of_a_request(watched, switch):
    content = json.dumps(PICTURE | {"enable_cache_dit": switch}).encode()
    answer = watched.http.post(
        "/v1/images/generations", content=content, headers={"content-type": "application/json"}
    )
    assert watched.refused("switch of a request", answer)
