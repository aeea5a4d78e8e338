"""Which of its scheduler's steps a pipeline runs: the beginning left out, or two evaluations for each step."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from sglang_cachedit_plugin.cache.spec import TransformerSpec
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.integration.diffusers import PipelineCache
from sglang_cachedit_plugin.integration.request import Session
from tests.models.on_diffusers.pipelines import PIPELINES
from tests.models.on_diffusers.proof import SMALL
from tests.models.on_diffusers.test_pipelines import call, schedule, serve

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
N = 12
PARTS = [name for name, case in PIPELINES.items() if case.first]
MASK = (1, 1, 0, 1, 0, 1, 0, 1, 0, 0, 1, 0)
"""Of its second half the steps 6, 8, 9 and 11 are cached; the first one of a run is computed."""


def watched(name: str, **knobs: Any) -> tuple[TransformerSpec, list[float], dict]:
    """A request of ``N`` steps: what it was served under, the timesteps that the transformer got, the report."""
    case, timesteps = PIPELINES[name], []
    pipe = case.build()
    scale = 1000 if name.startswith("Flux") else 1
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: timesteps.append(float(kwargs["timestep"].flatten()[0]) * scale), with_kwargs=True
    )
    cache = PipelineCache(pipe)
    session = Session("diffusers", Defaults().decide(True, {"scm_policy": "static", "max_warmup_steps": 0, **knobs}))
    with cache.request(session, N):
        call(pipe, case.call(SMALL), N)
        spec = cache.mounted["transformer"].cache.spec
    return spec, timesteps[:: len(case.branches)], session.close().as_dict()


@pytest.mark.parametrize("name", PARTS)
def test_image_to_image_takes_the_part_of_a_mask_at_its_own_timesteps(name):
    spec, timesteps, report = watched(name, steps_computation_mask=list(MASK))
    assert len(timesteps) == N // 2
    assert spec.timesteps == pytest.approx(timesteps, abs=0.01)
    assert schedule(report)["transformer"]["cond"] == ([0, 1, 4], [2, 3, 5])
    assert report["transformers"]["transformer"]["steps"] == N // 2
    assert report["reason"] is None


def test_a_mask_of_the_length_of_a_partial_run_is_taken_as_it_is():
    _, _, report = watched("FluxImg2ImgPipeline", steps_computation_mask=[1, 0, 1, 1, 0, 1])
    assert schedule(report)["transformer"]["cond"] == ([0, 2, 3, 5], [1, 4])


def test_a_preset_and_warmup_are_those_of_a_partial_run():
    spec, _, report = watched("FluxImg2ImgPipeline", scm_preset="fast", max_warmup_steps=2)
    assert spec.plan.num_steps == N // 2
    assert spec.plan.warmup == {0, 1}
    assert f"schedule off: {N // 2} steps, presets and bins need 8" in report["reason"]


def path() -> list[float]:
    """Timesteps of FluxImg2ImgPipeline before it leaves any out."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - step / N for step in range(N)])
    return scheduler.timesteps.tolist()


def tuned(**weights: list[float]) -> dict[str, Any]:
    """A schedule for all timesteps; ``weights`` of cached steps by ``at_STEP``, else those of the last output."""
    cached = [step for step, computed in enumerate(MASK) if not computed]
    weights = [weights.get(f"at_{step}", [1.0]) for step in cached]
    return {
        "forecast": "output",
        "schedules": [{
            "steps": N, "mask": list(MASK), "weights": weights, "timesteps": path(),
        }],
    }


def test_a_tuned_schedule_keeps_its_weights_for_their_timesteps():
    spec, timesteps, report = watched("FluxImg2ImgPipeline", **tuned(at_8=[1.1], at_9=[1.2], at_11=[-0.3, 1.3]))
    assert schedule(report)["transformer"]["cond"] == ([0, 1, 4], [2, 3, 5])
    assert report["reason"] is None
    found = {round(timesteps[step]): spec.weights_of("cond", step) for step in (2, 3, 5)}
    assert found == {round(path()[8]): (1.1,), round(path()[9]): (1.2,), round(path()[11]): (-0.3, 1.3)}


def test_weights_that_count_outputs_from_before_the_run_are_left_out():
    # Step 9 was tuned with the outputs of 5 and 7; the run begins at 6.
    spec, _, _ = watched("FluxImg2ImgPipeline", **tuned(at_9=[-0.2, 1.2]))
    assert [spec.weights_of("cond", step) for step in (2, 3, 5)] == [(1.0,), None, (1.0,)]


SECOND_ORDER = {
    "FlowMatchHeunDiscreteScheduler": "StableDiffusion3Pipeline",
    "HeunDiscreteScheduler": "PixArtSigmaPipeline",
    "KDPM2DiscreteScheduler": "PixArtSigmaPipeline",
}


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_each_evaluation_of_a_second_order_solver_is_a_step(name):
    case = PIPELINES[SECOND_ORDER[name]]
    pipe = case.build()
    pipe.scheduler = getattr(diffusers, name)()
    steps, evaluations = 6, 11
    plain = call(pipe, case.call(SMALL), steps)
    cache = PipelineCache(pipe)
    computed, report = serve(cache, case.call(SMALL), [1] * evaluations, steps)
    assert torch.equal(computed, plain)
    assert schedule(report)["transformer"]["cond"] == (list(range(evaluations)), [])
    assert report["transformers"]["transformer"]["steps"] == evaluations
    # An entry for each step asked for holds for both of its evaluations.
    _, report = serve(cache, case.call(SMALL), (1, 1, 0, 1, 0, 0), steps)
    assert schedule(report)["transformer"]["cond"] == ([0, 1, 2, 3, 6, 7], [4, 5, 8, 9, 10])
    _, report = serve(cache, case.call(SMALL), (1, 0) * 5 + (0,), steps)
    assert schedule(report)["transformer"]["cond"][1] == [1, 3, 5, 7, 9, 10]


def test_evaluations_beyond_the_steps_asked_for_are_cached_where_the_difference_allows():
    case = PIPELINES["StableDiffusion3Pipeline"]
    pipe = case.build()
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    knobs = {"residual_diff_threshold": 1.0, "max_warmup_steps": 1, "max_continuous_cached_steps": -1}
    session = Session("diffusers", Defaults().decide(True, knobs))
    with PipelineCache(pipe).request(session, 6):
        call(pipe, case.call(SMALL), 6)
    assert schedule(session.close().as_dict())["transformer"]["cond"] == ([0], list(range(1, 11)))


def test_image_to_image_with_a_second_order_solver_begins_between_two_steps():
    case = PIPELINES["StableDiffusion3Img2ImgPipeline"]
    pipe = case.build()
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    plain = call(pipe, case.call(SMALL), 6)
    cache = PipelineCache(pipe)
    computed, report = serve(cache, case.call(SMALL), [1] * 6, 6)
    assert torch.equal(computed, plain)
    assert schedule(report)["transformer"]["cond"] == (list(range(5)), [])
    # Of the six steps the last three: two evaluations, two, one.
    _, report = serve(cache, case.call(SMALL), (1, 1, 1, 1, 0, 0), 6)
    assert schedule(report)["transformer"]["cond"] == ([0, 1], [2, 3, 4])
