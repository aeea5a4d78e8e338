"""Requests that alternate every knob are each served as by a fresh process; branches are told apart."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.e2e.conftest import run_probe, run_together

BASE = {"width": 64, "height": 64, "num_inference_steps": 12, "prompt": "red apple", "seed": 1}
CFG = {"negative_prompt": "green cat", "true_cfg_scale": 3.0}
DYNAMIC = {"residual_diff_threshold": 0.9, "max_warmup_steps": 2}


def _cached(**params):
    return {"enable_cache_dit": True, "cache_dit_params": DYNAMIC | params}


SEQUENCE = {
    "defaults": BASE | _cached(),
    "other steps": BASE | {"num_inference_steps": 9} | _cached(),
    "other size": BASE | {"width": 96} | _cached(Fn_compute_blocks=2, Bn_compute_blocks=1),
    "two prompts' pictures": BASE | {"num_outputs_per_prompt": 2} | _cached(),
    "off": BASE | {"enable_cache_dit": False},
    "taylorseer": BASE | _cached(enable_taylorseer=True, taylorseer_order=2, max_continuous_cached_steps=1),
    "cfg": BASE | CFG | _cached(),
    "dmd": BASE | CFG | _cached(enable_dmd=True),
    "preset": BASE | _cached(scm_preset="fast", scm_policy="static"),
    "bins": BASE | _cached(scm_compute_bins=[4, 2, 2], scm_cache_bins=[2, 2]),
    "output": BASE | CFG | _cached(forecast="output", scm_preset="medium", scm_policy="static", max_warmup_steps=0),
    "output by threshold": BASE | _cached(forecast="output", forecast_order=2),
    "too many blocks": BASE | _cached(Fn_compute_blocks=99),
    "on again": BASE | {"prompt": "blue moon", "seed": 7} | _cached(),
}
BRANCHES = {
    "gated": {"cfg_gate_step": 0.5} | _cached(),
    "guidance 1": {"guidance_scale": 1.0} | _cached(),
    "serial": _cached(),
    "follows cond": _cached(cfg_diff_compute_separate=False),
    "experts": {
        "enable_cache_dit": True,
        "cache_dit_params": DYNAMIC | {"max_warmup_steps": 8, "secondary": {"max_warmup_steps": 1}},
    },
}
VIDEO = BASE | {"num_frames": 9, "negative_prompt": "green cat"}


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    """Results of all jobs by name."""
    folder = tmp_path_factory.mktemp("requests")
    sequence = [
        {
            "name": f"{backend} sequence",
            "server": {"model_path": str(models["flux"]), "backend": backend},
            "requests": list(SEQUENCE.values()),
        }
        for backend in ("sglang", "diffusers")
    ]
    fresh = copy.deepcopy(sequence)
    for job in fresh:
        job["name"] = job["name"].replace("sequence", "fresh")
        job["fresh"] = True
    branches = {
        "name": "branches",
        "server": {"model_path": str(models["wan22"]), "backend": "sglang"},
        "requests": [VIDEO | request for request in BRANCHES.values()],
    }
    first, second = run_together(
        lambda: run_probe([*sequence, branches], folder / "sequence"),
        lambda: run_probe(fresh, folder / "fresh"),
    )
    return first | second


@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
@pytest.mark.parametrize("name", SEQUENCE)
def test_each_request_equals_a_fresh_process(results, backend, name):
    index = list(SEQUENCE).index(name)
    served, fresh = results[f"{backend} sequence"][index], results[f"{backend} fresh"][index]
    assert served["error"] is None and fresh["error"] is None
    assert torch.equal(served["latents"], fresh["latents"])
    assert served["calls"] == fresh["calls"]
    reports = [{k: v for k, v in r["report"].items() if k != "denoising_s"} for r in (served, fresh)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
def test_the_sequence_caches_and_its_requests_differ(results, backend):
    """Shows that the comparison above can fail."""
    outcomes = dict(zip(SEQUENCE, results[f"{backend} sequence"], strict=True))
    for name in ("defaults", "taylorseer", "preset", "bins", "output", "output by threshold", "on again"):
        assert outcomes[name]["report"]["cached_steps"] > 0, name
    assert not torch.equal(outcomes["defaults"]["latents"], outcomes["off"]["latents"])
    assert not torch.equal(outcomes["defaults"]["latents"], outcomes["taylorseer"]["latents"])


def test_settings_that_do_not_fit_run_uncached_with_the_reason(results):
    outcomes = dict(zip(SEQUENCE, results["sglang sequence"], strict=True))
    report = outcomes["too many blocks"]["report"]
    assert not report["enabled"]
    assert "Fn_compute_blocks 99" in report["reason"]
    assert torch.equal(outcomes["too many blocks"]["latents"], outcomes["off"]["latents"])


def _steps(branch):
    return sorted(branch["computed"] + branch["cached"])


def test_the_host_names_branches_and_steps(results):
    outcomes = dict(zip(BRANCHES, results["branches"], strict=True))
    high, low = (
        outcomes["serial"]["report"]["transformers"][name]["branches"] for name in ("transformer", "transformer_2")
    )
    assert _steps(high["cond"]) == _steps(high["uncond"]) == list(range(8))
    assert _steps(low["cond"]) == _steps(low["uncond"]) == list(range(8, 12))
    assert high["cond"]["residual_diffs"] != high["uncond"]["residual_diffs"]


def test_guidance_1_has_one_branch(results):
    report = dict(zip(BRANCHES, results["branches"], strict=True))["guidance 1"]["report"]
    for transformer in report["transformers"].values():
        assert set(transformer["branches"]) == {"cond"}
    assert report["computed_steps"] + report["cached_steps"] == 12


def test_a_gated_uncond_branch_stops_and_cond_goes_on(results):
    report = dict(zip(BRANCHES, results["branches"], strict=True))["gated"]["report"]
    high = report["transformers"]["transformer"]["branches"]
    assert _steps(high["cond"]) == list(range(8))
    assert 0 < len(_steps(high["uncond"])) < 8


def test_the_other_branch_can_follow_cond(results):
    report = dict(zip(BRANCHES, results["branches"], strict=True))["follows cond"]["report"]
    high = report["transformers"]["transformer"]["branches"]
    assert high["cond"]["residual_diffs"] == high["uncond"]["residual_diffs"] != {}


def test_experts_have_settings_of_their_own(results):
    report = dict(zip(BRANCHES, results["branches"], strict=True))["experts"]["report"]
    experts = report["transformers"]
    assert experts["transformer"]["branches"]["cond"]["cached"] == []
    assert experts["transformer_2"]["branches"]["cond"]["cached"]
    assert report["config"]["secondary.max_warmup_steps"] == {
        "value": 1, "origin": "cache_dit_params.secondary.max_warmup_steps",
    }
