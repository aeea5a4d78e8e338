"""The corrector and error control in real pipelines of diffusers around tiny transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_cachedit_plugin.cache.error_control import BEGINNING, RESTART
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.integration.diffusers import PipelineCache
from sglang_cachedit_plugin.integration.request import Session
from tests.models.on_diffusers.pipelines import PIPELINES
from tests.models.on_diffusers.proof import SMALL
from tests.models.on_diffusers.test_pipelines import call, schedule

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
N = 20
NAMES = [
    "FluxPipeline", "WanPipeline", "QwenImagePipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "LTXPipeline",
]


def served(cache: PipelineCache, arguments: dict[str, Any], **knobs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Latents and report of one request."""
    session = Session("diffusers", Defaults().decide(True, knobs))
    try:
        with cache.request(session, N):
            latents = call(cache.pipe, arguments, N)
    finally:
        report = session.close().as_dict()
    return latents, report


STATIC = {
    "steps_computation_mask": [1, 1, *[1, 0, 0] * 5, 1, 0, 1], "scm_policy": "static", "max_warmup_steps": 0,
}


@pytest.fixture(params=NAMES, scope="module")
def case(request):
    return request.param, PIPELINES[request.param], PipelineCache(PIPELINES[request.param].build())


def test_all_steps_computed_is_the_uncached_picture(case):
    _, each, cache = case
    plain = call(cache.pipe, each.call(SMALL), N)
    for knobs in ({"steps_computation_mask": [1] * N, "scm_policy": "static"}, {"error_tolerance": 0.0}):
        latents, report = served(cache, each.call(SMALL), corrector=True, **knobs)
        assert torch.equal(latents, plain), knobs
        assert report["corrector"]["enabled"] and report["corrector"]["corrected_steps"] == 0
    assert "step" not in vars(cache.pipe.scheduler)
    assert torch.equal(call(cache.pipe, each.call(SMALL), N), plain)


def test_cached_steps_are_corrected(case):
    _, each, cache = case
    found = [served(cache, each.call(SMALL), corrector=on, **STATIC) for on in (False, True)]
    assert not torch.equal(found[0][0], found[1][0])
    assert bool(torch.isfinite(found[1][0]).all())
    report = found[1][1]
    assert 0 < report["corrector"]["corrected_steps"] <= report["cached_steps"]
    assert found[0][1]["corrector"]["corrected_steps"] == 0
    assert report["corrector"]["enabled"] and report["corrector"]["reason"] is None


def test_an_error_tolerance_serves_the_pipeline(case):
    _, each, cache = case
    latents, report = served(cache, each.call(SMALL), error_tolerance=1.0)
    assert report["enabled"] and report["cached_steps"] > 0
    assert bool(torch.isfinite(latents).all())
    for transformer, branches in schedule(report).items():
        decisions = list(branches.values())
        assert all(each == decisions[0] for each in decisions), "the branches of a step are decided together"
        computed = decisions[0][0]
        first = computed[0]
        needed = BEGINNING if transformer == "transformer" else RESTART
        assert set(range(first, first + needed)) <= set(computed)
    last = max(step for branches in schedule(report).values() for found in branches.values() for step in found[0])
    assert last == max(step for branches in schedule(report).values() for both in branches.values()
                       for steps in both for step in steps)
    assert report["error_control"]["errors"]
    again, _ = served(cache, each.call(SMALL), error_tolerance=1.0)
    assert torch.equal(again, latents), "nothing is left of the request before"
