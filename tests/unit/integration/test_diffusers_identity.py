"""Branches and steps of diffusers pipelines: named, told by their embeddings, batched, or refused."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.integration.diffusers import PipelineCache
from sglang_cachedit_plugin.integration.request import Session

STEPS = 6
MASK = [1, 1, 0, 1, 0, 1]


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Pipe:
    """The loop of a diffusers pipeline around a real transformer and a real scheduler."""

    def __init__(self):
        torch.manual_seed(0)
        self.transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=3, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
        ).eval()
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.config = SimpleNamespace()

    def forward(self, embeddings: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        count = embeddings.shape[0]
        return self.transformer(
            hidden_states=latents.expand(count, -1, -1), encoder_hidden_states=embeddings,
            pooled_projections=torch.ones(count, 8), timestep=torch.full((count,), 0.5),
            img_ids=torch.zeros(4, 3), txt_ids=torch.zeros(3, 3), return_dict=False,
        )[0]

    @torch.no_grad()
    def run(self, style: str, first: int = 0) -> torch.Tensor:
        """Final latents.

        Args:
            style: how the pipeline does CFG.
            first: index of the first timestep that it takes, of which it tells nobody.
        """
        self.scheduler.set_timesteps(STEPS)
        copied = copy.deepcopy(self.scheduler)
        cond, uncond = noise(1, 1, 3, 8), noise(2, 1, 3, 8)
        latents = noise(3, 1, 4, 4)
        for t in self.scheduler.timesteps[first:]:
            copied.step(latents, t, latents)
            if style == "batched":
                positive, negative = self.forward(torch.cat([cond, uncond]), latents).chunk(2)
            elif style == "named":
                with self.transformer.cache_context("uncond"):
                    negative = self.forward(uncond.clone(), latents)
                with self.transformer.cache_context("cond"):
                    positive = self.forward(cond.clone(), latents)
            elif style == "embeddings":
                positive, negative = self.forward(cond, latents), self.forward(uncond, latents)
            else:
                positive, negative = self.forward(cond.clone(), latents), self.forward(uncond.clone(), latents)
            change = negative + 2.0 * (positive - negative)
            latents = self.scheduler.step(change, t, sample=latents, return_dict=False)[0]
        return latents


def serve(pipe: Pipe, style: str, **run: int) -> tuple[torch.Tensor, dict]:
    knobs = {"steps_computation_mask": MASK, "scm_policy": "static", "max_warmup_steps": 0}
    session = Session("diffusers", Defaults().decide(True, knobs))
    cache = PipelineCache(pipe)
    with cache.request(session, STEPS):
        latents = pipe.run(style, **run)
        spec = cache.mounted["transformer"].cache.spec
    assert spec.timesteps == tuple(pipe.scheduler.timesteps[run.get("first", 0):].tolist())
    return latents, session.close().as_dict()


CACHED = [step for step, computed in enumerate(MASK) if not computed]


@pytest.mark.parametrize("style", ["named", "embeddings"])
def test_two_forwards_a_step_are_two_branches(style):
    latents, report = serve(Pipe(), style)
    branches = report["transformers"]["transformer"]["branches"]
    assert {name: branch["cached"] for name, branch in branches.items()} == {"cond": CACHED, "uncond": CACHED}
    assert not torch.equal(latents, Pipe().run(style))


def test_both_ways_to_tell_branches_give_the_same_picture():
    assert torch.equal(serve(Pipe(), "named")[0], serve(Pipe(), "embeddings")[0])


def test_batched_cfg_is_one_branch():
    _, report = serve(Pipe(), "batched")
    branches = report["transformers"]["transformer"]["branches"]
    assert {name: branch["cached"] for name, branch in branches.items()} == {"cond": CACHED}


def test_branches_that_cannot_be_told_apart_are_computed_and_the_report_says_so():
    latents, report = serve(Pipe(), "anonymous")
    assert torch.equal(latents, Pipe().run("anonymous"))
    assert report["cached_steps"] == 0
    assert "cannot be told apart" in report["reason"]


def test_the_pipeline_is_its_own_afterwards():
    pipe = Pipe()
    serve(pipe, "named")
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert "cache_context" not in pipe.transformer.__dict__
    assert torch.equal(pipe.run("named"), Pipe().run("named"))


class Watched(FlowMatchEulerDiscreteScheduler):
    """Knows whether it stepped."""

    stepped = False

    def step(self, *args, **kwargs):
        self.stepped = True
        return super().step(*args, **kwargs)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda scheduler: pickle.loads(pickle.dumps(scheduler)),
    "from_config": lambda scheduler: type(scheduler).from_config(scheduler.config),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_the_scheduler_steps_for_itself_and_is_not_counted(way):
    pipe = Pipe()
    pipe.scheduler = Watched()
    cache = PipelineCache(pipe)
    session = Session("diffusers", Defaults().decide(True, {}))
    with cache.request(session, STEPS):
        pipe.scheduler.set_timesteps(STEPS)
        pipe.scheduler.step(noise(1, 2), pipe.scheduler.timesteps[0], noise(2, 2))
        copied = COPIES[way](pipe.scheduler)
        assert type(copied) is Watched
        assert not {"step", "set_timesteps", "__getstate__"} & set(vars(copied))
        copied.stepped = False
        copied.set_timesteps(STEPS)
        copied.step(noise(1, 2), copied.timesteps[0], noise(2, 2))
        assert copied.stepped
        pipe.forward(noise(1, 1, 3, 8), noise(3, 1, 4, 4))
    session.close()
    assert session.stats.transformers["transformer"].branches["cond"].computed == [1]


def test_the_class_of_the_scheduler_is_its_own_during_a_request():
    pipe = Pipe()
    with PipelineCache(pipe).request(Session("diffusers", Defaults().decide(True, {})), STEPS):
        assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler


@pytest.mark.parametrize("when", ["before", "during"])
def test_what_others_put_on_the_scheduler_stays(when):
    pipe, calls = Pipe(), []

    def put():
        own = pipe.scheduler.step

        def step(*args, **kwargs):
            calls.append(args)
            return own(*args, **kwargs)

        pipe.scheduler.step = step
        return step

    step = put() if when == "before" else None
    with PipelineCache(pipe).request(Session("diffusers", Defaults().decide(True, {})), STEPS):
        step = step or put()
        pipe.run("batched")
    assert pipe.scheduler.step is step
    assert len(calls) == STEPS
    assert set(vars(pipe.scheduler)) & {"set_timesteps", "__getstate__"} == set()


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, DDIMScheduler])
def test_the_first_step_tells_where_a_run_begins_that_nobody_announced(scheduler):
    pipe = Pipe()
    pipe.scheduler = scheduler()
    latents, report = serve(pipe, "embeddings", first=1)
    found = report["transformers"]["transformer"]
    assert found["steps"] == STEPS - 1
    # Step 1 may be cached, but what step 0 left stood at another timestep and is dropped.
    assert {name: (each["computed"], each["cached"]) for name, each in found["branches"].items()} == {
        "cond": ([0, 1, 2, 4], [3]), "uncond": ([0, 1, 2, 4], [3]),
    }
    assert report["reason"] is None
    assert not torch.equal(latents, pipe.run("embeddings", first=1))


def test_a_pipeline_that_sets_no_timesteps_is_not_cached_and_the_report_says_so():
    pipe = Pipe()
    session = Session("diffusers", Defaults().decide(True, {}))
    with PipelineCache(pipe).request(session, STEPS), torch.no_grad():
        pipe.forward(noise(1, 1, 3, 8), noise(3, 1, 4, 4))
    report = session.close().as_dict()
    assert (report["enabled"], report["reason"]) == (False, "Pipe does not set the timesteps of its scheduler")


def test_a_warmup_request_rehearses_what_later_ones_run():
    pipe, forwards = Pipe(), []
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: forwards.append(1))
    session = Session("diffusers", Defaults().decide(True, {}))
    with PipelineCache(pipe).request(session, STEPS, warmup=True):
        pipe.run("batched")
    report = session.close().as_dict()
    assert len(report["transformers"]["transformer"]["branches"]["cond"]["computed"]) <= STEPS
    assert len(forwards) == STEPS + 2


def test_a_pipeline_without_a_scheduler_is_refused_with_the_reason():
    pipe = Pipe()
    pipe.scheduler = None
    assert PipelineCache(pipe).refusal == "Pipe has no scheduler, so its steps cannot be counted"


def test_runs_of_a_single_step_are_told_apart():
    pipe = Pipe()
    session = Session("diffusers", Defaults().decide(True, {"max_warmup_steps": 0}))
    with PipelineCache(pipe).request(session, 1), torch.no_grad():
        for _ in range(3):
            pipe.scheduler.set_timesteps(1)
            pipe.scheduler.step(pipe.forward(noise(1, 1, 3, 8), noise(3, 1, 4, 4)), 1000.0, noise(3, 1, 4, 4))
    report = session.close().as_dict()
    assert report["transformers"]["transformer"]["branches"]["cond"]["computed"] == [0, 0, 0]
    assert "told apart" not in report["reason"]
