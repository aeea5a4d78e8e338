"""Mounted before torch.compile: no request compiles anything anew, and off is the graphs of before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch._dynamo.utils import counters

from sglang_cachedit_plugin.cache.cached_model import CachedModel, preset_mask
from sglang_cachedit_plugin.cache.denoising_steps import DenoisingSteps
from sglang_cachedit_plugin.cache.solvers import Solver
from sglang_cachedit_plugin.cache.spec import Groups, Identity, RequestSpec, TransformerSpec
from sglang_cachedit_plugin.cache.step_plan import StepPlan, build_plan
from sglang_cachedit_plugin.cache.warmup import Warmup
from sglang_cachedit_plugin.config.settings import CacheSettings
from sglang_cachedit_plugin.report.stats import RequestStats

STEPS = 8
REQUESTS = [
    {},
    {"residual_diff_threshold": 0.5, "max_warmup_steps": 2},
    {"enable_taylorseer": True, "max_warmup_steps": 2, "residual_diff_threshold": 0.9},
    {"enable_taylorseer": True, "taylorseer_order": 2, "residual_diff_threshold": 0.9, "max_warmup_steps": 3},
    {"enable_dmd": True, "residual_diff_threshold": 0.9, "max_warmup_steps": 5},
    {"steps_computation_mask": (1, 1, 0, 0, 1, 0, 0, 1), "steps_computation_policy": "static"},
    {"steps_computation_mask": (1, 0, 1, 0, 1, 0, 0, 0), "steps_computation_policy": "static", "Fn_compute_blocks": 2},
    {"Bn_compute_blocks": 1, "residual_diff_threshold": 0.9, "max_warmup_steps": 2},
    {"forecast": "output", "steps_computation_mask": (1, 1, 0, 1, 0, 1, 0, 0), "steps_computation_policy": "static"},
    {"forecast": "output", "residual_diff_threshold": 0.9, "max_warmup_steps": 2},
]


class Model:
    """A tiny FLUX transformer driven through ``STEPS`` steps."""

    def __init__(self):
        torch.manual_seed(0)
        self.module = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=3, num_single_layers=3, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
        ).eval()
        self.step = 0
        self.model = CachedModel({"transformer": self.module})

    def wanted(self, spec: TransformerSpec, stats: RequestStats, **more) -> RequestSpec:
        return RequestSpec(
            transformers=(spec,), stats=stats, identify=lambda name, kwargs: Identity("cond", self.step), **more
        )

    def request(self, knobs: dict | None, tokens: int = 16) -> tuple[torch.Tensor, RequestStats]:
        stats = RequestStats(backend="native", enabled=knobs is not None)
        spec = None
        if knobs is not None:
            settings = CacheSettings(**{"max_warmup_steps": 4, **knobs})
            plan, _ = build_plan(settings, STEPS, preset_mask)
            spec = self.wanted(TransformerSpec(name="transformer", settings=settings, plan=plan), stats)
        self.model.prepare(spec)
        output = self.loop(tokens)
        self.model.prepare(None)
        return output, stats

    def warmup(self, knobs: dict, *, rehearsed: bool = True) -> RequestStats:
        """A request of one step, as the host makes for its warmup."""
        stats = RequestStats(backend="native", enabled=True)
        settings = CacheSettings(**knobs)
        plan, _ = build_plan(settings, 1, preset_mask)
        spec = TransformerSpec(name="transformer", settings=settings, plan=plan)
        warmup = Warmup(pytest.fail, compiled=True).run if rehearsed else None
        self.model.prepare(self.wanted(spec, stats, warmup=warmup))
        self.loop(steps=1)
        self.model.prepare(None)
        return stats

    @torch.no_grad()
    def loop(self, tokens: int = 16, steps: int = STEPS) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(1, tokens, 16, generator=generator)
        text, pooled = (torch.randn(*shape, generator=generator) for shape in ((1, 4, 16), (1, 16)))
        image_ids, text_ids = torch.zeros(tokens, 3), torch.zeros(4, 3)
        for self.step in range(steps):
            time = torch.tensor([1.0 - self.step / STEPS])
            velocity = self.module(
                hidden_states=latents, encoder_hidden_states=text, pooled_projections=pooled, timestep=time,
                img_ids=image_ids, txt_ids=text_ids, return_dict=False,
            )[0]
            latents = self.advance(velocity, latents)
        return latents

    def advance(self, velocity: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The latents after a step."""
        return latents - velocity / STEPS


class Stepped(Model):
    """The same with a scheduler, whose steps are corrected; an error tolerance decides before each forward."""

    def request(self, knobs: dict | None, tokens: int = 16) -> tuple[torch.Tensor, RequestStats]:
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.scheduler.set_timesteps(STEPS)
        stats = RequestStats(backend="diffusers", enabled=True)
        settings = CacheSettings(**{"max_warmup_steps": 2, **knobs})
        self.steps = DenoisingSteps(Solver(self.scheduler, self.scheduler.step), settings, stats, Groups())
        plan, _ = build_plan(settings, STEPS, preset_mask)
        if settings.error_tolerance is not None:
            settings = replace(settings, forecast="output")
            plan = StepPlan(num_steps=STEPS, static=True, computes=self.steps.computes)
        spec = self.wanted(TransformerSpec(name="transformer", settings=settings, plan=plan), stats)
        self.model.prepare(spec)
        self.steps.spec = spec
        with self.steps.in_place():
            output = self.loop(tokens)
        self.steps.finish()
        self.model.prepare(None)
        return output, stats

    def advance(self, velocity: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return self.scheduler.step(velocity, self.scheduler.timesteps[self.step], latents, return_dict=False)[0]


def compile_whole(module: torch.nn.Module) -> None:
    module.compile(backend="eager")


def compile_blocks(module: torch.nn.Module) -> None:
    module.compile_repeated_blocks(backend="eager")


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compile_it", [compile_whole, compile_blocks])
def test_off_after_being_mounted_runs_the_graphs_of_never_mounted(compile_it):
    plain = Model()
    compile_it(plain.module)
    expected, unmounted = plain.loop(), graphs()
    assert unmounted > 0
    torch._dynamo.reset()
    counters.clear()
    model = Model()
    model.model.mount()
    compile_it(model.module)
    first, _ = model.request(None)
    assert graphs() == unmounted
    assert not counters["graph_break"] or compile_it is compile_whole
    model.request(REQUESTS[1])
    before = graphs()
    again, _ = model.request(None)
    assert graphs() == before
    assert torch.equal(first, expected) and torch.equal(again, expected)


@pytest.mark.parametrize("compile_it", [compile_whole, compile_blocks])
def test_twenty_requests_compile_nothing_after_the_first_two(compile_it):
    model = Model()
    model.model.mount()
    compile_it(model.module)
    model.request(None)
    _, stats = model.request(REQUESTS[1])
    assert stats.count("cached") > 0
    warm = graphs()
    for knobs in [*REQUESTS, None, *REQUESTS[::-1]]:
        _, stats = model.request(knobs)
        assert knobs is None or knobs == {} or stats.count("cached") > 0, knobs
    assert graphs() == warm


@pytest.mark.parametrize("compile_it", [compile_whole, compile_blocks])
def test_corrector_and_error_control_compile_nothing_after_the_first_requests(compile_it):
    model, eager = Stepped(), Stepped()
    model.model.mount()
    compile_it(model.module)
    requests = [{"residual_diff_threshold": 0.9}, *({"error_tolerance": value} for value in (0.0, 0.1, 1000.0))]
    for knobs in requests[:2]:
        model.request(knobs)
    warm = graphs()
    for knobs in [*requests, *requests[::-1]]:
        got, stats = model.request(knobs)
        assert torch.equal(got, eager.request(knobs)[0]), knobs
        assert stats.corrector.corrected_steps == stats.count("cached") or knobs == requests[0]
    assert graphs() == warm
    assert model.request(requests[-1])[1].count("cached") > 0


@pytest.mark.parametrize("compile_it", [compile_whole, compile_blocks])
def test_after_a_warmup_of_one_step_no_request_compiles_anything(compile_it):
    fresh, model = Model(), Model()
    expected = [fresh.request(knobs)[0] for knobs in (None, *REQUESTS)]
    model.model.mount()
    compile_it(model.module)
    stats = model.warmup({"enable_taylorseer": True, "forecast": "output"})
    assert (stats.count("computed"), stats.count("cached")) == (1, 0)
    assert model.model.buffer_bytes() == 0
    warm = graphs()
    for knobs, picture in zip((None, *REQUESTS), expected, strict=True):
        got, stats = model.request(knobs)
        assert torch.equal(got, picture), knobs
        assert not knobs or stats.count("cached") > 0
    assert graphs() == warm > 0


def test_the_hosts_own_warmup_step_would_not_do():
    """Shows that the test above can fail."""
    model = Model()
    model.model.mount()
    compile_whole(model.module)
    model.warmup({}, rehearsed=False)
    warm = graphs()
    model.request(REQUESTS[1])
    assert graphs() > warm


def test_a_compiled_cached_step_equals_the_eager_one():
    eager, compiled = Model(), Model()
    compiled.model.mount()
    compile_blocks(compiled.module)
    for knobs in REQUESTS:
        expected, _ = eager.request(knobs)
        got, _ = compiled.request(knobs)
        assert torch.equal(got, expected), knobs


def test_blocks_compile_without_a_break():
    model = Model()
    model.model.mount()
    compile_blocks(model.module)
    model.request(REQUESTS[1])
    assert not counters["graph_break"]
