"""On the real host: caching off and all-ones masks change nothing, cached steps leave out what they should."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.e2e.conftest import run_probe, run_together

STEPS = 12
MASK = [1, 1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 1]
IMAGE = {"width": 64, "height": 64, "num_inference_steps": STEPS, "prompt": "red apple", "seed": 1}
VIDEO = IMAGE | {"num_frames": 9}
CFG = {"negative_prompt": "green cat"}
FAMILIES = {
    "flux": IMAGE,
    "qwen": IMAGE | CFG | {"guidance_scale": 4.0},
    "wan21": VIDEO | CFG,
    "wan22": VIDEO | CFG,
}
EXPERT_STEPS = {"sglang wan22": (8, 4), "diffusers wan22": (4, 8)}
"""Steps of the high and low noise experts; the backends shift the timesteps differently."""
BACKENDS = ("sglang", "diffusers")


def _cached(**params):
    return {"enable_cache_dit": True, "cache_dit_params": params}


REQUESTS = {
    "off": {},
    "ones": _cached(steps_computation_mask=[1] * STEPS),
    "static": _cached(steps_computation_mask=MASK, scm_policy="static", max_warmup_steps=0),
    "off again": {"enable_cache_dit": False},
}


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    """(plain, plugged) results of every family on both backends."""
    folder = tmp_path_factory.mktemp("pictures")
    jobs = [
        {
            "name": f"{backend} {family}",
            "server": {"model_path": str(models[family]), "backend": backend},
            "requests": [request | extra for extra in REQUESTS.values()],
        }
        for backend in BACKENDS
        for family, request in FAMILIES.items()
    ]
    plain_jobs = copy.deepcopy(jobs)
    for job in plain_jobs:
        job["requests"] = job["requests"][:1]
    return run_together(
        lambda: run_probe(plain_jobs, folder / "plain", SGLANG_PLUGINS="none"),
        lambda: run_probe(jobs, folder / "plugged"),
    )


@pytest.fixture(params=[f"{backend} {family}" for backend in BACKENDS for family in FAMILIES])
def case(request, results):
    plain, plugged = results
    return request.param, plain[request.param][0], dict(zip(REQUESTS, plugged[request.param], strict=True))


def test_nothing_fails(case):
    _, plain, plugged = case
    assert plain["error"] is None and plain["report"] is None
    assert [outcome["error"] for outcome in plugged.values()] == [None] * len(REQUESTS)


@pytest.mark.parametrize("request_name", ["off", "ones", "off again"])
def test_equal_to_the_unplugged_host_bit_for_bit(case, request_name):
    _, plain, plugged = case
    assert torch.equal(plugged[request_name]["latents"], plain["latents"])


def test_cached_steps_change_the_latents(case):
    """Shows that the comparison above can fail."""
    _, plain, plugged = case
    assert not torch.equal(plugged["static"]["latents"], plain["latents"])


def test_a_static_mask_runs_exactly_the_blocks_it_should(case):
    name, plain, plugged = case
    firsts = {"transformer.transformer_blocks.0", "transformer.blocks.0", "transformer_2.blocks.0"}
    high, _ = EXPERT_STEPS.get(name, (STEPS, 0))
    masks = {"transformer": MASK[:high], "transformer_2": MASK[high:]}
    assert plain["calls"]
    for block, full in plain["calls"].items():
        mask = masks[block.split(".")[0]]
        branches = full // len(mask)
        # The first step of a transformer is computed whatever the mask says: nothing precedes it.
        computed = len(mask) if block in firsts else sum(mask) + (0 if mask[0] else 1)
        assert full == len(mask) * branches
        assert plugged["static"]["calls"][block] == computed * branches, block


def test_the_report_says_what_ran(case):
    name, _, plugged = case
    report = plugged["static"]["report"]
    assert report["enabled"] and report["backend"] == ("native" if name.startswith("sglang") else "diffusers")
    branches = {"cond", "uncond"} if "flux" not in name else {"cond"}
    steps = []
    for transformer in report["transformers"].values():
        assert set(transformer["branches"]) == branches
        for branch in transformer["branches"].values():
            assert branch["residual_diffs"] == {}
            assert len(branch["computed"]) + len(branch["cached"]) == transformer["steps"]
        steps += transformer["branches"]["cond"]["computed"] + transformer["branches"]["cond"]["cached"]
    assert sorted(steps) == list(range(STEPS))
    assert report["computed_steps"] + report["cached_steps"] == STEPS
    assert report["config"]["steps_computation_mask"]["origin"] == "cache_dit_params.steps_computation_mask"
    assert plugged["off"]["report"]["reason"] == "not configured"
    assert plugged["off again"]["report"]["reason"] == "request"
