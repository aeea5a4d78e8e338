"""Cached steps are set right by the next computed output, with every scheduler whose steps can be repeated."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_cachedit_plugin.cache.solvers import Solver, hooked_scheduler
from tests.unit.cache.loops import FLOW, SCHEDULERS, SHAPE, Loop, noise, uncached

NAMES = pytest.mark.parametrize("name", SCHEDULERS)
MASKS = st.lists(st.integers(0, 1), min_size=10, max_size=10).map(lambda rest: [1, 1, 1, *rest, 1])
STEPS = 14
BASES = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in range(1, 4)]


def polynomial(degree: int):
    """An output that is a polynomial in the position and does not look at the latents."""
    return lambda number, position, latents: sum(BASES[power] * position**power for power in range(degree + 1))


def curved(number: int, position: float, latents: torch.Tensor) -> torch.Tensor:
    """An output that depends on the latents and bends over the positions."""
    return torch.tanh(latents) * (0.5 + position) + BASES[0] * torch.sin(torch.tensor(3.0 * position))


def bent(number: int, position: float, latents: torch.Tensor) -> torch.Tensor:
    """An output that no polynomial gives, and that does not look at the latents."""
    return BASES[0] * torch.sin(torch.tensor(3.0 * position)) + BASES[1]


def last_output(loop: Loop):
    """Repeat the last computed output, as a cache of order 0 does."""
    return lambda number, position: loop.last


@NAMES
def test_all_steps_computed_gives_the_schedulers_own_latents_bit_for_bit(name):
    assert torch.equal(Loop(name, STEPS, curved).run([1] * STEPS), uncached(name, STEPS, curved))


@NAMES
@pytest.mark.parametrize("order", [1, 2])
@settings(max_examples=4)
@given(mask=MASKS)
def test_outputs_that_are_polynomials_are_restored(name, order, mask):
    output = polynomial(order)
    loop = Loop(name, STEPS, output, corrector_order=order, corrector_carry=0.0)
    found = loop.run(mask, last_output(loop))
    torch.testing.assert_close(found, uncached(name, STEPS, output), rtol=2e-3, atol=2e-3)
    assert loop.stats.corrector.corrected_steps == mask.count(0)


@NAMES
@settings(max_examples=4)
@given(mask=MASKS)
def test_right_predictions_stay_as_they_are(name, mask):
    output = polynomial(1)
    loop = Loop(name, STEPS, output, corrector_carry=1.0)
    found = loop.run(mask, lambda number, position: output(number, position, None))
    torch.testing.assert_close(found, uncached(name, STEPS, output), rtol=2e-3, atol=2e-3)
    assert (loop.stats.corrector.largest_correction or 0.0) < 1e-4


@NAMES
def test_scheduler_is_left_as_a_run_with_the_corrected_outputs_leaves_it(name):
    """Step by step beside a fresh scheduler that never saw a prediction."""
    output, mask = polynomial(2), [1, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1, 1]
    loop = Loop(name, STEPS, output, corrector_carry=0.0)
    loop.run(mask, last_output(loop))
    fresh = SCHEDULERS[name]()
    fresh.set_timesteps(STEPS)
    latents, places = noise(), Solver(fresh, fresh.step)
    for number, timestep in enumerate(fresh.timesteps):
        value = output(number, places.place(number).position, None)
        latents = fresh.step(value, timestep, latents, return_dict=False)[0]
    found, expected = loop.solver.snapshot(), places.snapshot()
    assert set(found) == set(expected), "no name is left behind or lost"
    for key in ("_step_index", "lower_order_nums", "this_order", "num_inference_steps"):
        assert found.get(key) == expected.get(key)
    for mine, theirs in zip(found.get("model_outputs", []), expected.get("model_outputs", []), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3)


@NAMES
def test_corrected_run_is_nearer_to_the_uncached_one(name):
    mask = [1, 1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1]
    exact = uncached(name, STEPS, bent)
    errors = []
    for corrector in (False, True):
        loop = Loop(name, STEPS, bent, corrector=corrector, corrector_carry=0.0)
        errors.append(float((loop.run(mask, last_output(loop)) - exact).norm()))
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "noise"),
        (DDPMScheduler, "noise"),
        (EulerAncestralDiscreteScheduler, "noise"),
        (lambda: UniPCMultistepScheduler(**FLOW), None),
        (FlowMatchHeunDiscreteScheduler, "twice"),
        (HeunDiscreteScheduler, "twice"),
    ],
)
def test_corrector_says_why_it_is_off(scheduler, reason, monkeypatch):
    monkeypatch.setitem(SCHEDULERS, "other", scheduler)
    loop = Loop("other", STEPS, polynomial(1))
    loop.steps.finish()
    assert (reason or "no step") in loop.stats.corrector.reason


class _Doubling(FlowMatchEulerDiscreteScheduler):
    """Unknown to the plugin, and deterministic."""


class _Drifting(FlowMatchEulerDiscreteScheduler):
    """Unknown to the plugin; a repeated step gives another result."""

    calls = 0

    def step(self, model_output, timestep, sample, return_dict=True):
        type(self).calls += 1
        moved = model_output * (1.0 + 1e-3 * self.calls)
        return super().step(moved, timestep, sample, return_dict=return_dict)


def test_unknown_scheduler_that_repeats_its_steps_is_corrected(monkeypatch):
    monkeypatch.setitem(SCHEDULERS, "other", lambda: _Doubling(shift=3.0))
    loop = Loop("other", STEPS, polynomial(1), corrector_carry=0.0)
    found = loop.run([1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1, 1, 0, 1], last_output(loop))
    assert loop.stats.corrector.corrected_steps == 6
    torch.testing.assert_close(found, uncached("diffusers Euler", STEPS, polynomial(1)), rtol=1e-4, atol=1e-4)


def test_unknown_scheduler_that_does_not_repeat_its_steps_is_left_alone(monkeypatch):
    monkeypatch.setitem(SCHEDULERS, "other", lambda: _Drifting(shift=3.0))
    loop = Loop("other", STEPS, polynomial(1))
    loop.run([1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1, 1, 0, 1], last_output(loop))
    assert loop.stats.corrector.corrected_steps == 0
    assert "another result" in loop.stats.corrector.reason


def test_another_branch_in_the_middle_starts_the_history_over():
    """As where guidance ends: outputs before and after have nothing to do with each other."""
    loop = Loop("diffusers Euler", STEPS, polynomial(0), corrector_carry=0.0)
    branches = loop.stats.transformers["transformer"]
    latents, seen = noise(), []
    with loop.steps.in_place():
        for number, timestep in enumerate(loop.scheduler.timesteps):
            computed = number not in (5, 6, 10)
            for branch in ("cond", "uncond") if number < 7 else ("cond",):
                branches.branch(branch).record(number, not computed)
            seen.append(latents)
            value = BASES[0] if number < 7 else BASES[1]
            latents = loop.scheduler.step(value * (1.0 if computed else 0.5), timestep, latents, return_dict=False)[0]
    assert loop.stats.corrector.corrected_steps == 0, "reported at the end only"
    loop.steps.finish()
    assert loop.stats.corrector.corrected_steps == 1, "steps 5 and 6 lie before the change and stay"


def test_latents_of_another_shape_start_the_history_over():
    loop = Loop("diffusers Euler", STEPS, polynomial(0))
    branch = loop.stats.transformers["transformer"].branch("cond")
    latents = noise()
    with loop.steps.in_place():
        for number, timestep in enumerate(loop.scheduler.timesteps):
            if number == 7:
                latents = torch.cat([latents, latents], 1)
            branch.record(number, number in (5, 6))
            latents = loop.scheduler.step(torch.zeros_like(latents), timestep, latents, return_dict=False)[0]
    loop.steps.finish()
    assert loop.stats.corrector.corrected_steps == 0


def test_a_correction_that_is_no_number_is_not_reported():
    loop = Loop("diffusers DDIM, v", STEPS, polynomial(1))
    loop.run([1, 1, 1, 0] + [1] * (STEPS - 4), lambda number, position: torch.full(SHAPE, torch.nan))
    assert loop.stats.corrector.largest_correction is None


def test_cached_steps_keep_three_latents_at_most():
    loop = Loop("diffusers Euler", STEPS, curved)
    branch, latents, held = loop.stats.transformers["transformer"].branch("cond"), noise(), []
    with loop.steps.in_place():
        for number, timestep in enumerate(loop.scheduler.timesteps):
            branch.record(number, number % 2 == 1)
            latents = loop.scheduler.step(curved(number, 0.5, latents), timestep, latents, return_dict=False)[0]
            held.append(loop.steps.held_bytes())
    size = latents.numel() * latents.element_size()
    assert max(held) <= 3 * size, "two outputs and the latents at the first cached step"


def test_a_stage_that_writes_the_result_into_its_latents_is_corrected_all_the_same():
    """As Kandinsky 6 does, whose schedulers keep no latents."""
    found = []
    for in_place in (False, True):
        loop = Loop("diffusers Euler", STEPS, bent, corrector_carry=0.0)
        branch, latents = loop.stats.transformers["transformer"].branch("cond"), noise()
        video = torch.cat([latents, torch.zeros_like(latents)], -1)
        with loop.steps.in_place():
            for number, timestep in enumerate(loop.scheduler.timesteps):
                branch.record(number, number in (4, 5, 8))
                output = bent(number, loop.solver.place(number).position, latents)
                output = output * (0.9 if number in (4, 5, 8) else 1.0)
                if in_place:
                    half = video[..., : SHAPE[-1]]
                    half[:] = loop.scheduler.step(output, timestep, half, return_dict=False)[0]
                else:
                    latents = loop.scheduler.step(output, timestep, latents, return_dict=False)[0]
        loop.steps.finish()
        assert loop.stats.corrector.corrected_steps == 3
        found.append(video[..., : SHAPE[-1]] if in_place else latents)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_steps_cached_before_anything_was_computed_stay_as_they_are():
    """As right after a change of the branches: one output gives no polynomial between two sides."""
    loop = Loop("diffusers Euler", STEPS, bent)
    found = loop.run([0, 0] + [1] * (STEPS - 2), lambda number, position: bent(number, position, None))
    assert torch.equal(found, uncached("diffusers Euler", STEPS, bent))
    assert loop.stats.corrector.corrected_steps == 0


def test_a_timestep_for_each_token_takes_the_flow_with_the_other_sign():
    """As stages do that keep some tokens clean; the correction carries over to the output alike."""
    def run(by_token: bool) -> torch.Tensor:
        loop = Loop("diffusers Euler", STEPS, curved)
        branch, latents, last = loop.stats.transformers["transformer"].branch("cond"), noise(), None
        with loop.steps.in_place():
            for number, timestep in enumerate(loop.scheduler.timesteps):
                branch.record(number, cached := number in (4, 5, 8))
                last = last if cached else curved(number, loop.solver.place(number).position, latents)
                tokens = {"per_token_timesteps": timestep.expand(SHAPE[:2])} if by_token else {}
                output = -last if by_token else last
                latents = loop.scheduler.step(output, timestep, latents, return_dict=False, **tokens)[0]
        return latents

    torch.testing.assert_close(run(True), run(False), rtol=1e-4, atol=1e-4)


def test_copies_of_a_hooked_scheduler_make_plain_steps():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    with hooked_scheduler(scheduler, step=lambda *args, **kwargs: None):
        copies = copy.copy(scheduler), copy.deepcopy(scheduler)
        assert scheduler.step() is None
        for each in copies:
            assert each.step(noise(), each.timesteps[0], noise(), return_dict=False)[0].shape == SHAPE
    assert "step" not in vars(scheduler)


@pytest.mark.parametrize(
    ("settings_", "asked", "corrected"),
    [
        ({}, False, 3),
        ({"forecast": "output"}, False, 0),
        ({"enable_taylorseer": True}, False, 0),
        ({"enable_dmd": True}, False, 0),
        ({"forecast": "output"}, True, 3),
        ({"error_tolerance": 0.01}, False, 3),
    ],
)
def test_forecasts_under_guidance_are_corrected_only_where_it_is_asked_for(settings_, asked, corrected):
    loop = Loop("diffusers Euler", STEPS, curved, asked=asked, **settings_)
    transformer, latents = loop.stats.transformers["transformer"], noise()
    with loop.steps.in_place():
        for number, timestep in enumerate(loop.scheduler.timesteps):
            for branch in ("cond", "uncond"):
                transformer.branch(branch).record(number, number in (5, 6, 9))
            latents = loop.scheduler.step(curved(number, 0.5, latents), timestep, latents, return_dict=False)[0]
    loop.steps.finish()
    assert loop.stats.corrector.corrected_steps == corrected
    assert loop.stats.corrector.enabled is bool(corrected)
    assert corrected or "guidance" in loop.stats.corrector.reason
