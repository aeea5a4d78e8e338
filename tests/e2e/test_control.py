"""A real server under changes: live settings, metrics, and 100 mixed requests from four clients."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

from benchmarks.soak.load import Load, ask_plain, differences, scrape
from sglang_cachedit_plugin import cli
from tests.e2e.conftest import ROOT, image_server

ADDRESS = "/v1/cache_dit"
PICTURE = {
    "prompt": "red apple", "size": "64x64", "num_inference_steps": 8, "seed": 1, "output_format": "png",
    "response_format": "b64_json",
}
REQUESTS, CLIENTS, SAMPLES = 100, 4, 4


@pytest.fixture
def control(server):
    """The address of control; whatever a test changes is taken back."""
    yield server + ADDRESS
    httpx.delete(server + ADDRESS, timeout=60).raise_for_status()


def picture(server: str, **fields) -> dict:
    answer = httpx.post(f"{server}/v1/images/generations", json=PICTURE | fields, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_change_holds_for_the_next_request_and_delete_takes_it_back(server, control):
    start = httpx.get(control).json()
    plain = picture(server)
    state = httpx.put(control, json={"max_warmup_steps": 6, "residual_diff_threshold": 1.0}, timeout=60).json()
    assert state["workers"]["consistent"]
    changed = picture(server)["cache_dit"]
    assert changed["config"]["max_warmup_steps"] == {"value": 6, "origin": "control.max_warmup_steps"}
    assert changed["transformers"]["transformer"]["branches"]["cond"]["computed"][:6] == list(range(6))
    back = httpx.delete(control, timeout=60).json()
    assert {key: back[key] for key in ("enabled", "config", "control")} == {
        key: start[key] for key in ("enabled", "config", "control")
    }
    again = picture(server)
    assert again["data"][0]["b64_json"] == plain["data"][0]["b64_json"]


def test_caching_and_profiles_are_switched_while_the_server_runs(server, control):
    httpx.put(control, json={"enabled": False}, timeout=60).raise_for_status()
    off = picture(server)["cache_dit"]
    assert (off["enabled"], off["reason"]) == (False, "not configured")
    body = {"profile": "mine", "profiles": {"mine": {"scm_preset": "fast", "scm_policy": "static"}}}
    httpx.put(control, json=body, timeout=60).raise_for_status()
    mine = picture(server)["cache_dit"]
    assert (mine["profile"], mine["config"]["steps_computation_mask"]["value"]) == ("mine", "fast")
    named = picture(server, cache_dit_params={"profile": "draft"})["cache_dit"]
    assert (named["profile"], named["config"]["steps_computation_mask"]["value"]) == ("draft", None)
    httpx.delete(control, timeout=60).raise_for_status()
    gone = httpx.post(f"{server}/v1/images/generations", json=PICTURE | {"cache_dit_params": {"profile": "mine"}})
    assert gone.status_code == 400


def test_the_command_changes_one_thing_and_the_log_says_it(server, control, capsys):
    assert cli.main(["set", "enabled=false", "--url", f"{server}/v1"]) == 0
    assert cli.main(["set", "residual_diff_threshold=0.5", "--url", server]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{server}: enabled True -> False", f"{server}: residual_diff_threshold 0.24 -> 0.5",
    ]
    off = picture(server)["cache_dit"]
    assert (off["enabled"], off["reason_codes"]) == (False, ["not_configured"])
    assert cli.main(["status", "--url", server]) == 0
    assert "caching off (control)" in capsys.readouterr().out
    assert cli.main(["reset", "--url", server]) == 0
    assert f"{server}: enabled False -> True" in capsys.readouterr().out


def test_a_warmup_is_counted_nowhere(server):
    before, totals = scrape(server), httpx.get(server + ADDRESS).json()["totals"]
    body = {"prompt": "a", "width": 64, "height": 64, "num_inference_steps": 4, "warmup": True}
    assert httpx.post(f"{server}/generate", json=body, timeout=120).json()["cache_stats"]["enabled"]
    assert (scrape(server), httpx.get(server + ADDRESS).json()["totals"]) == (before, totals)


def test_a_bad_change_leaves_everything_as_it_was(server, control):
    before = httpx.get(control).json()
    answer = httpx.put(control, json={"enabled": False, "profiles": {"a": {"taylorseer_order": 7}}})
    assert answer.status_code == 400
    assert answer.json()["detail"] == "taylorseer_order = 7 (control.profiles.a): expected a whole number from 1 to 2"
    assert httpx.put(control, content=b"x" * 70_000).status_code == 413
    assert httpx.put(control, json={}, headers={"X-Forwarded-For": "10.0.0.9"}).status_code == 403
    after = httpx.get(control).json()
    assert {**after, "workers": None} == {**before, "workers": None}


def test_what_is_mounted(server, control):
    picture(server, enable_cache_dit=True)
    (replica,) = httpx.get(control).json()["workers"]["replicas"]
    (rank,) = replica["ranks"]
    (model,) = rank["mounted"]
    assert model["backend"] == "native"
    assert model["transformers"]["transformer"]["class"] == "FluxTransformer2DModel"
    assert sum(model["transformers"]["transformer"]["blocks"].values()) == 12


@pytest.fixture(scope="module")
def load(server):
    """Four clients with the mix, and ``/metrics`` before and after."""
    before = scrape(server)
    made = Load(server, seed=5, keep=SAMPLES)
    outcome = made.run(CLIENTS, requests=REQUESTS)
    return outcome, before, scrape(server)


def test_every_answer_is_what_was_asked(load):
    outcome, _, _ = load
    assert outcome.problems == []
    assert outcome.answers + outcome.refused == REQUESTS
    assert outcome.changes >= 5 and outcome.refused >= 3


def test_the_metrics_are_the_sum_of_the_reports(load):
    outcome, before, after = load
    assert differences(before, after, outcome.counted) == []
    assert sum(count for key, count in outcome.counted.items() if key[-1] == "cached") > 100


def test_the_dashboard_asks_for_numbers_that_exist(load):
    _, _, after = load
    names = {key[0] for key in after}
    labels = {"sglang_cache_dit_steps_total": {"transformer", "branch", "kind"}, "sglang_cache_dit_requests_total": {
        "outcome"}}
    dashboard = json.loads(Path(ROOT / "docs" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(queries) >= 6
    for query in queries:
        asked = re.findall(r"sglang_cache_dit_\w+", query)
        assert asked, query
        for name in asked:
            assert name.replace("_bucket", "_count") in names, query
        for name in asked:
            for label in re.findall(r"(\w+)=", query):
                assert label in labels.get(name, {"transformer", "branch", "le"}), query


def test_samples_equal_the_same_requests_on_a_fresh_server(load, models, tmp_path):
    outcome, _, _ = load
    samples = outcome.samples
    assert len(samples) == SAMPLES
    with image_server(models, tmp_path) as fresh, httpx.Client(timeout=120) as client:
        for wish, report, pictures in samples:
            change = {
                key: entry["value"] for key, entry in report["config"].items()
                if entry["origin"].startswith("control.") and "secondary" not in key
            }
            client.put(fresh + ADDRESS, json=change | {"enabled": True}).raise_for_status()
            status, answer = ask_plain(client, fresh, wish)
            assert status == 200, answer
            assert [data["b64_json"] for data in answer["data"]] == pictures
            steps = [each["transformers"]["transformer"]["branches"] for each in (answer["cache_dit"], report)]
            assert steps[0] == steps[1]
