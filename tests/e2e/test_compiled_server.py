"""A real server that compiles: its warmup compiles all, requests nothing; a LoRA comes and goes."""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from tests.e2e.conftest import serving
from tests.e2e.test_host_modes import DYNAMIC, STATIC, _adapter

CAN_COMPILE = shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()
pytestmark = pytest.mark.skipif(not CAN_COMPILE, reason="torch.compile needs a C++ compiler and Python's headers")
STEPS = 8
PICTURE = {
    "prompt": "red apple", "size": "64x64", "num_inference_steps": STEPS, "seed": 1, "output_format": "png",
    "response_format": "b64_json",
}
FLAGS = ("--enable-torch-compile", "true", "--warmup-mode", "server", "--warmup-resolutions", "64x64")
KNOBS = {
    "off": None, "every step": {"steps_computation_mask": [1] * STEPS}, "static": STATIC, "dynamic": DYNAMIC,
    "taylorseer": DYNAMIC | {"enable_taylorseer": True}, "output": STATIC | {"forecast": "output"}, "off again": None,
}
READY = "The server is fired up and ready to roll!"
COMPILING = "torchdynamo start tracing"


def _draw(url: str, params: dict | None) -> SimpleNamespace:
    caching = {"enable_cache_dit": False} if params is None else {"enable_cache_dit": True, "cache_dit_params": params}
    answer = httpx.post(f"{url}/v1/images/generations", json=PICTURE | caching, timeout=300)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return SimpleNamespace(picture=body["data"][0]["b64_json"], report=body["cache_dit"])


def _lora(url: str, address: str, **fields) -> None:
    answer = httpx.post(f"{url}/v1/{address}", json=fields, timeout=300)
    assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def served(models, tmp_path_factory):
    """Answers by name, those under a LoRA and after it, and the server's log before the LoRA."""
    folder = tmp_path_factory.mktemp("compiled-server")
    environment = {
        "SGLANG_CACHE_DIT_ENABLED": "true", "SGLANG_TORCH_COMPILE_MODE": "default", "TORCH_LOGS": "dynamo",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    with serving(models["flux"], folder, *FLAGS, "--enable-metrics", **environment) as url:
        answers = {name: _draw(url, params) for name, params in KNOBS.items()}
        log = (folder / "server.log").read_text(errors="replace")
        metrics = httpx.get(f"{url}/metrics").text
        _lora(url, "set_lora", lora_nickname="tiny", lora_path=_adapter(folder / "tiny.safetensors"))
        answers["with LoRA"] = _draw(url, STATIC)
        _lora(url, "unmerge_lora_weights")
        answers["without LoRA"] = _draw(url, STATIC)
    return SimpleNamespace(answers=answers, log=log, metrics=metrics)


def test_all_compiling_is_done_by_the_warmup(served):
    before, ready, after = served.log.partition(READY)
    assert ready
    assert before.count(COMPILING) > 0
    assert after.count(COMPILING) == 0


def test_compiled_requests_are_cached_as_asked(served):
    for name, params in KNOBS.items():
        report = served.answers[name].report
        cached = 0 if "off" in name or name == "every step" else report["cached_steps"]
        assert report["cached_steps"] == cached, name
        assert name in ("off", "off again", "every step") or cached > 0, name
        assert report["enabled"] is (params is not None)


def test_compiled_with_every_step_computed_is_the_uncached_picture(served):
    answers = served.answers
    assert answers["every step"].picture == answers["off again"].picture == answers["off"].picture
    assert answers["static"].picture != answers["off"].picture


def test_a_lora_is_seen_by_cached_requests_and_leaves_nothing_behind(served):
    answers = served.answers
    assert answers["with LoRA"].report["cached_steps"] == 4
    assert answers["with LoRA"].picture != answers["static"].picture
    assert answers["without LoRA"].picture == answers["static"].picture


def test_requests_of_the_warmup_are_no_requests_in_the_metrics(served):
    """The host draws one of its own for torch.compile, under no other name than that of a real one."""
    totals = [line for line in served.metrics.splitlines() if line.startswith("sglang_cache_dit_requests_total")]
    assert sum(float(line.rsplit(" ", 1)[1]) for line in totals) == len(KNOBS), totals
    assert len(re.findall(r"cache-dit: \S+: (?:off \[request\]|\d+ steps)", served.log)) == len(KNOBS)
