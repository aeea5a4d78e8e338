"""A real server: reports in its answers, 400 for bad settings, profiles, GET /v1/cache_dit."""

from __future__ import annotations

import io
import json
import time

import httpx
import openai
import pytest
from PIL import Image

from tests.e2e.conftest import client_of

STEPS = 12
IMAGE = {"prompt": "red apple", "size": "64x64", "response_format": "b64_json"}
EXTRA = {"num_inference_steps": STEPS, "seed": 1, "output_format": "png"}

GOOD = {
    "off": {"enable_cache_dit": False},
    "defaults of the file": {},
    "fast": {"enable_cache_dit": True, "cache_dit_params": {"profile": "fast"}},
    "balanced": {"enable_cache_dit": True, "cache_dit_params": {"profile": "balanced"}},
    "quality": {"enable_cache_dit": True, "cache_dit_params": {"profile": "quality"}},
    "the file's profile": {"enable_cache_dit": True, "cache_dit_params": {"profile": "draft"}},
    "knobs": {
        "enable_cache_dit": True,
        "cache_dit_params": {"max_warmup_steps": 2, "residual_diff_threshold": 1.0, "max_continuous_cached_steps": 1},
    },
    "off again": {"enable_cache_dit": False},
}
BAD = {
    "unknown knob": ({"max_warmup_stepz": 1}, ["max_warmup_stepz = 1", "did you mean 'max_warmup_steps'"]),
    "wrong type": ({"residual_diff_threshold": "abc"}, ["residual_diff_threshold = 'abc'", "a number from 0 to 1"]),
    "out of range": ({"taylorseer_order": 7}, ["taylorseer_order = 7", "from 1 to 2"]),
    "misspelt preset": ({"scm_preset": "fsat"}, ["scm_preset = 'fsat'", "did you mean 'fast'"]),
    "misspelt profile": ({"profile": "drfat"}, ["balanced, draft, fast, quality", "did you mean 'draft'"]),
    "bins that do not pair": ({"scm_compute_bins": [4, 2]}, ["scm_cache_bins", "together or not at all"]),
    "second transformer": ({"secondary": {"Fn_compute_blocks": 0}}, ["(cache_dit_params.secondary)", "at least 1"]),
    "both calibrators": ({"enable_taylorseer": True, "enable_dmd": True}, ["exclude each other"]),
}


def post(url: str, **fields) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json=IMAGE | EXTRA | fields, timeout=120)


def finished(videos, job):
    """A video job once nothing more happens to it."""
    deadline = time.monotonic() + 60
    while job.status not in ("completed", "failed") and time.monotonic() < deadline:
        time.sleep(0.3)
        job = videos.retrieve(job.id)
    return job


def test_a_video_answers_with_its_report_and_a_bad_setting_with_400(video_server):
    videos = client_of(video_server).videos
    video = {"prompt": "red apple", "size": "64x64"}
    extra = {"num_frames": 9, "num_inference_steps": STEPS, "seed": 1, "enable_cache_dit": True}
    with pytest.raises(openai.BadRequestError) as caught:
        videos.create(**video, extra_body=extra | {"cache_dit_params": {"forecast": "outptu"}})
    assert "forecast = 'outptu' (cache_dit_params): expected one of residual, output; did you mean 'output'?" in str(
        caught.value
    )
    params = {"Fn_compute_blocks": 99, "strict": True}
    job = finished(videos, videos.create(**video, extra_body=extra | {"cache_dit_params": params}))
    assert job.status == "failed" and "strict = True (cache_dit_params.strict): Fn_compute_blocks 99" in str(job.error)
    job = finished(videos, videos.create(**video, extra_body=extra | {"cache_dit_params": {"profile": "fast"}}))
    assert job.status == "completed", job
    report = job.model_extra["cache_dit"]
    assert (report["enabled"], report["profile"], report["backend"]) == (True, "fast", "native")
    branches = report["transformers"]["transformer"]["branches"]
    assert set(branches) == {"cond", "uncond"}
    assert branches["cond"]["cached"] == branches["uncond"]["cached"] != []


def test_a_video_that_is_cancelled_leaves_nothing_to_the_next(video_server):
    body = {
        "prompt": "red apple", "width": 64, "height": 64, "num_frames": 9, "num_inference_steps": STEPS, "seed": 1,
        "enable_cache_dit": True, "cache_dit_params": {"residual_diff_threshold": 0.9, "max_warmup_steps": 2},
    }

    def draw() -> tuple[list, dict]:
        answer = httpx.post(f"{video_server}/generate", json=body, timeout=120).raise_for_status().json()
        return answer["videos"], answer["cache_stats"]["transformers"]

    before, videos = draw(), client_of(video_server).videos
    job = videos.create(prompt="blue moon", size="64x64", extra_body={
        "num_frames": 9, "num_inference_steps": 40, "seed": 2, "enable_cache_dit": True,
        "cache_dit_params": body["cache_dit_params"] | {"Fn_compute_blocks": 2, "enable_taylorseer": True},
    })
    assert videos.delete(job.id).status == "deleted"
    with pytest.raises(openai.NotFoundError):
        videos.retrieve(job.id)
    assert draw() == before and before[1]["transformer"]["branches"]["cond"]["cached"]


@pytest.fixture(scope="module")
def answers(server):
    """One answer of the OpenAI client for each good request, in order."""
    client = client_of(server)
    return {
        name: client.images.generate(**IMAGE, extra_body=EXTRA | fields) for name, fields in GOOD.items()
    }


@pytest.mark.parametrize("name", GOOD)
def test_the_report_says_what_was_asked(answers, name):
    report, asked = answers[name].model_extra["cache_dit"], GOOD[name]
    params = asked.get("cache_dit_params", {})
    assert report["backend"] == "native"
    assert report["enabled"] is asked.get("enable_cache_dit", True)
    assert report["reason"] == (None if report["enabled"] else "request")
    assert report["profile"] == params.get("profile")
    assert report["computed_steps"] + report["cached_steps"] == (STEPS if report["enabled"] else 0)
    for knob, value in params.items():
        if knob != "profile":
            assert report["config"][knob] == {"value": value, "origin": f"cache_dit_params.{knob}"}


def test_profiles_decide_which_steps_are_cached(answers):
    reports = {name: answer.model_extra["cache_dit"] for name, answer in answers.items()}
    cached = {name: report["cached_steps"] for name, report in reports.items()}
    assert 0 < cached["quality"] <= cached["balanced"] <= cached["fast"] < STEPS
    draft = reports["the file's profile"]["transformers"]["transformer"]["branches"]["cond"]
    assert (draft["computed"], draft["cached"]) == ([0, 1, 2, 5, 8, 11], [3, 4, 6, 7, 9, 10])
    assert reports["fast"]["config"]["error_tolerance"]["origin"] == "built-in profiles.fast.error_tolerance"
    assert reports["defaults of the file"]["config"]["max_warmup_steps"]["value"] == 3


def test_pictures_follow_the_report(answers):
    pictures = {name: answer.data[0].b64_json for name, answer in answers.items()}
    assert pictures["off"] == pictures["off again"]
    assert len({pictures[name] for name in ("off", "fast", "the file's profile")}) == 3


@pytest.mark.parametrize("name", BAD)
def test_a_bad_setting_is_400_in_one_line(server, name):
    params, parts = BAD[name]
    with pytest.raises(openai.BadRequestError) as caught:
        client_of(server).images.generate(**IMAGE, extra_body=EXTRA | {"cache_dit_params": params})
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "png")
    edit = httpx.post(
        f"{server}/v1/images/edits", data={"prompt": "apple", "cache_dit_params": json.dumps(params)},
        files={"image": ("in.png", picture.getvalue())}, timeout=30,
    )
    assert edit.status_code == 400
    for detail in (caught.value.body["detail"], edit.json()["detail"]):
        assert len(detail.splitlines()) == 1
        for part in parts:
            assert part in detail


@pytest.mark.parametrize("fields", [{"cache_dit_params": "fast"}, {"cache_dit_params": []}, {"enable_cache_dit": "j"}])
def test_fields_of_another_type_are_400(server, fields):
    answer = post(server, **fields)
    assert answer.status_code == 400
    assert f"{next(iter(fields))} = " in answer.json()["detail"]


def test_the_server_goes_on_and_answers_as_before(server, answers):
    assert post(server, cache_dit_params={"profile": "nothing"}).status_code == 400
    again = post(server, **GOOD["fast"])
    assert again.status_code == 200
    assert again.json()["data"][0]["b64_json"] == answers["fast"].data[0].b64_json


def test_settings_and_totals_are_shown(server, answers):
    before = httpx.get(f"{server}/v1/cache_dit").json()
    assert before["enabled"] == {"value": True, "origin": "cache.yaml"}
    assert before["config"]["max_warmup_steps"]["origin"] == "cache.yaml cache_config.max_warmup_steps"
    assert {"balanced", "draft", "fast", "quality"} <= set(before["profiles"])
    report = post(server, n=2, **GOOD["fast"]).json()["cache_dit"]
    after = httpx.get(f"{server}/v1/cache_dit").json()["totals"]
    assert after["cached_requests"] == before["totals"]["cached_requests"] + 1
    assert after["cached_steps"] == before["totals"]["cached_steps"] + report["cached_steps"]


def test_the_field_is_described_in_openapi(server):
    described = httpx.get(f"{server}/openapi.json").json()
    for model in ("ImageResponse", "VideoResponse"):
        assert "cache_dit" in described["components"]["schemas"][model]["properties"]
    assert "/v1/cache_dit" in described["paths"]
