"""Which steps an error tolerance computes: for any errors, and in denoising loops at real schedulers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_cachedit_plugin.cache.error_control import BEGINNING, LONGEST, RESTART, ErrorControl
from sglang_cachedit_plugin.cache.similarity import relative_error
from tests.unit.cache.loops import SCHEDULERS, SHAPE, Loop, noise, uncached
from tests.unit.cache.test_corrector import BASES, curved, polynomial

NAMES = pytest.mark.parametrize("name", SCHEDULERS)
STEPS = 28
ERRORS = st.lists(st.floats(0.0, 3.0), min_size=STEPS, max_size=STEPS)
TOLERANCES = st.floats(1e-4, 10.0)
PATHS = st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=STEPS).map(lambda steps: [*sorted(steps)[::-1], 0.0])


def path(steps: int) -> list[float]:
    """Positions of a flow with shift 3."""
    even = [1.0 - step / steps for step in range(steps)]
    return [*(3.0 * s / (1.0 + 2.0 * s) for s in even), 0.0]


def walked(control: ErrorControl, errors, steps: int, restarts=()) -> list[bool]:
    """Whether each step is computed; a computed one whose forecast was possible errs by its entry of ``errors``."""
    decisions, last = [], None
    for step in range(steps):
        if step in restarts:
            control.restart()
        decisions.append(control.computes(step))
        if decisions[-1]:
            # The error of a computed step is known at the next one.
            if last is not None:
                control.measured(*last)
            last = (step, control.spread(step), errors[step]) if control.measures else None
            control.computed(step)
    return decisions


def runs(decisions: list[bool]) -> list[int]:
    """Lengths of the runs of cached steps."""
    text = "".join("x" if computed else "." for computed in decisions)
    return [len(run) for run in text.split("x") if run]


@given(errors=ERRORS)
def test_tolerance_zero_computes_every_step(errors):
    assert all(walked(ErrorControl(0.0, path(STEPS)), errors, STEPS))


@given(positions=PATHS, errors=ERRORS, tolerance=TOLERANCES, restarts=st.sets(st.integers(0, STEPS - 1), max_size=3))
def test_beginning_end_restarts_and_the_longest_run_hold_for_any_errors(positions, errors, tolerance, restarts):
    steps = len(positions) - 1
    control = ErrorControl(tolerance, positions)
    decisions = walked(control, errors, steps, restarts)
    assert all(decisions[:BEGINNING]) and decisions[-1]
    assert max(runs(decisions), default=0) <= LONGEST
    for restart in restarts:
        assert all(decisions[restart : restart + RESTART])
    assert set(control.errors) <= {step for step, computed in enumerate(decisions) if computed}


@given(errors=ERRORS, tolerance=TOLERANCES)
def test_what_is_passed_on_stays_within_the_tolerance_for_each_run(errors, tolerance):
    control = ErrorControl(tolerance, path(STEPS))
    found = runs(walked(control, errors, STEPS))
    assert control.passed_on <= tolerance * len(found) * (1 + 1e-9)


@given(errors=ERRORS, tolerance=TOLERANCES, factor=st.floats(1.0, 100.0))
def test_a_larger_tolerance_makes_the_first_run_no_shorter(errors, tolerance, factor):
    """Only the first: the runs after it begin at other steps, with other forecasts."""
    first = []
    for each in (tolerance, factor * tolerance):
        decisions = walked(ErrorControl(each, path(STEPS)), errors, STEPS)
        start = decisions.index(False) if False in decisions else STEPS
        first.append((-start, next(iter(runs(decisions)), 0)))
    assert first[0] <= first[1]


@given(error=st.floats(1e-6, 1.0), tolerance=TOLERANCES, factor=st.floats(1.0, 100.0))
def test_errors_scaled_with_the_tolerance_decide_the_same(error, tolerance, factor):
    factor = 2.0 ** round(math.log2(factor))
    decisions = [
        walked(ErrorControl(tolerance * by, path(STEPS)), [error * by] * STEPS, STEPS) for by in (1.0, factor)
    ]
    assert decisions[0] == decisions[1]


@pytest.mark.parametrize("error", [math.nan, math.inf, -math.inf])
def test_an_error_that_is_no_number_computes_every_further_step_and_is_told(error):
    control = ErrorControl(10.0, path(STEPS))
    errors = [1e-6] * STEPS
    measured = next(step for step, computed in enumerate(walked(ErrorControl(10.0, path(STEPS)), errors, STEPS))
                    if computed and step > BEGINNING)
    errors[measured] = error
    decisions = walked(control, errors, STEPS)
    following = next(step for step in range(measured + 1, STEPS) if decisions[step])
    assert False in decisions[:measured] and all(decisions[following:])
    assert f"step {measured}" in control.problem and str(error) in control.problem


def test_forecasts_without_error_make_the_longest_runs():
    decisions = walked(ErrorControl(1e-6, path(STEPS)), [0.0] * STEPS, STEPS)
    assert set(runs(decisions)[:-1]) == {LONGEST}


@given(positions=st.lists(st.sampled_from([1.0, 0.5, 0.25, 0.0]), min_size=1, max_size=12), error=st.floats(0.0, 1.0))
def test_places_that_come_twice_are_no_failure(positions, error):
    """Schedules rounded to whole timesteps, and those whose last step stands at the end already."""
    positions = [*sorted(positions)[::-1], 0.0]
    steps = len(positions) - 1
    decisions = walked(ErrorControl(0.1, positions), [error] * steps, steps)
    assert decisions[-1]


def test_worst_item_of_a_batch_decides():
    output = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    forecast = output.clone()
    forecast[1] *= 1.5
    forecast[2] *= 0.9
    assert float(relative_error(forecast, output, None)) == pytest.approx(0.5, rel=1e-5)
    halves = relative_error(forecast.bfloat16(), output.bfloat16(), None)
    assert halves.dtype == torch.float32 and float(halves) == pytest.approx(0.5, rel=1e-2)


# Loops


def decisions_of(loop: Loop) -> list[bool]:
    branch = loop.stats.transformers["transformer"].branches["cond"]
    cached = set(branch.cached)
    return [step not in cached for step in range(len(branch.computed) + len(cached))]


@NAMES
def test_tolerance_zero_gives_the_schedulers_own_latents_bit_for_bit(name):
    loop = Loop(name, 14, curved, error_tolerance=0.0)
    assert torch.equal(loop.run(), uncached(name, 14, curved))
    assert all(decisions_of(loop))


@NAMES
def test_outputs_that_are_linear_in_the_position_are_exact_with_the_longest_runs(name):
    loop = Loop(name, STEPS, polynomial(1), error_tolerance=0.01, corrector_carry=0.0)
    found = loop.run()
    torch.testing.assert_close(found, uncached(name, STEPS, polynomial(1)), rtol=2e-3, atol=2e-3)
    assert runs(decisions_of(loop))[0] == LONGEST
    assert max(loop.stats.error_control.errors.values()) < 1e-4


def test_outputs_that_never_change_are_cached_in_the_longest_runs():
    loop = Loop("diffusers Euler", STEPS, polynomial(0), error_tolerance=0.01)
    loop.run()
    assert set(runs(decisions_of(loop))[:-1]) == {LONGEST}


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 9])
@pytest.mark.parametrize("tolerance", [0.01, 10.0])
@NAMES
def test_few_steps_never_fail_and_compute_the_last(name, steps, tolerance):
    loop = Loop(name, steps, curved, error_tolerance=tolerance)
    found = loop.run()
    decisions = decisions_of(loop)
    assert len(decisions) == steps and decisions[-1] and all(decisions[:BEGINNING])
    assert bool(torch.isfinite(found).all())
    if all(decisions):
        assert torch.equal(found, uncached(name, steps, curved))


def test_an_output_that_is_nan_computes_the_rest_and_is_told():
    def broken(number, position, latents):
        return curved(number, position, latents) * (math.nan if number >= 9 else 1.0)

    loop = Loop("diffusers Euler", STEPS, broken, error_tolerance=10.0)
    loop.run()
    measured, following = [step for step in decisions_of_steps(loop) if step >= 9][:2]
    assert all(decisions_of(loop)[following:])
    assert f"at step {measured} is nan: every step after it was computed" in loop.stats.as_dict()["reason"]


def decisions_of_steps(loop: Loop) -> list[int]:
    return [step for step, computed in enumerate(decisions_of(loop)) if computed]


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (DDPMScheduler, "DDPMScheduler draws noise in each step"),
        (lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "draws noise in each step"),
        (FlowMatchHeunDiscreteScheduler, "evaluates the model twice a step"),
    ],
)
def test_a_scheduler_whose_steps_cannot_be_repeated_computes_all_and_says_so(scheduler, reason, monkeypatch):
    monkeypatch.setitem(SCHEDULERS, "other", scheduler)
    loop = Loop("other", 10, curved, error_tolerance=10.0)
    loop.run()
    assert all(decisions_of(loop))
    report = loop.stats.as_dict()
    assert reason in loop.stats.corrector.reason
    assert f"{reason}; every step is computed" in report["reason"]


class Stage:
    """A loop whose steps go through ``DenoisingSteps.predict``, as the native stage's do.

    Args:
        calls: (number) -> transformer and branches of a step.
    """

    def __init__(self, calls, output=curved, tolerance: float = 10.0, name: str = "diffusers Euler", **settings):
        self.loop = Loop(name, STEPS, output, error_tolerance=tolerance, **settings)
        self.calls, self.output, self.computed = calls, output, []
        self.loop.stats.transformers["transformer_2"] = type(self.loop.stats.transformers["transformer"])(steps=STEPS)

    def run(self) -> torch.Tensor:
        steps, scheduler, latents = self.loop.steps, self.loop.scheduler, noise()
        with steps.in_place():
            for number, timestep in enumerate(scheduler.timesteps):
                def compute(number=number, latents=latents):
                    self.computed.append(number)
                    return self.output(number, self.loop.solver.place(number).position, latents)

                value = steps.predict(*self.calls(number), compute)
                latents = scheduler.step(value, timestep, latents, return_dict=False)[0]
        return latents

    @property
    def cached(self) -> list[int]:
        return [step for step in range(STEPS) if step not in self.computed]


def test_a_cached_step_counts_for_every_branch_and_runs_none():
    stage = Stage(lambda number: ("transformer", ["cond", "uncond"]))
    stage.run()
    branches = stage.loop.stats.transformers["transformer"].branches
    assert stage.cached
    assert {name: branch.cached for name, branch in branches.items()} == dict.fromkeys(
        ("cond", "uncond"), stage.cached
    )


@pytest.mark.parametrize("calls", [
    lambda number: ("transformer" if number < 12 else "transformer_2", ["cond"]),
    lambda number: ("transformer", ["cond", "uncond"] if number < 12 else ["cond"]),
])
def test_nothing_crosses_a_change_of_the_transformer_or_the_branches(calls):
    """The output jumps at the change: a forecast or a correction across it would be far from either side."""
    def jumping(number, position, latents):
        return BASES[0] if number < 12 else -5.0 * BASES[1]

    stage = Stage(calls, jumping, corrector_carry=0.0)
    found = stage.run()
    assert all(step in stage.computed for step in range(12, 12 + RESTART))
    assert any(step < 12 for step in stage.cached) and any(step > 12 for step in stage.cached)
    torch.testing.assert_close(found, uncached("diffusers Euler", STEPS, jumping), rtol=1e-4, atol=1e-4)
    stage.loop.steps.finish()
    assert max(stage.loop.stats.error_control.errors.values()) < 1e-5


def test_each_loop_of_a_request_begins_anew():
    loop = Loop("diffusers Euler", STEPS, curved, error_tolerance=10.0)
    loop.run(last=False)
    loop.steps.begin_loop()
    loop.scheduler.set_timesteps(STEPS)
    found = loop.run()
    alone = Loop("diffusers Euler", STEPS, curved, error_tolerance=10.0)
    assert torch.equal(found, alone.run())
    twice, once = (each.stats.transformers["transformer"].branches["cond"] for each in (loop, alone))
    assert once.cached and twice.cached == 2 * once.cached
    assert loop.stats.error_control.passed_on == pytest.approx(2 * alone.stats.error_control.passed_on)


def test_the_errors_of_each_loop_of_a_request_are_kept():
    def other(step, place, latents):
        return 0.5 * curved(step, 1.5 * place, latents)

    loop = Loop("diffusers Euler", STEPS, curved, error_tolerance=10.0)
    loop.run(last=False)
    loop.steps.begin_loop()
    loop.scheduler.set_timesteps(STEPS)
    loop._output = other
    loop.run()
    alone = [Loop("diffusers Euler", STEPS, each, error_tolerance=10.0) for each in (curved, other)]
    for each in alone:
        each.run()
    first, second = (each.stats.error_control.errors for each in alone)
    assert first and second and first != second
    assert loop.stats.error_control.errors == first | {f"loop 2: {step}": error for step, error in second.items()}


def test_a_loop_whose_scheduler_is_not_told_its_beginning_stands_at_its_own_places():
    """Some pipelines leave out the first timesteps of image-to-image and do not tell the scheduler."""
    positions = []
    for told in (True, False):
        loop = Loop("diffusers UniPC", STEPS, curved, error_tolerance=0.01)
        if told:
            loop.scheduler.set_begin_index(STEPS // 2)
        latents = noise()
        with loop.steps.in_place():
            for number, timestep in enumerate(loop.scheduler.timesteps[STEPS // 2 :]):
                computed = loop.steps.computes()
                place = loop.solver.place(STEPS // 2 + number).position
                output = curved(number, place, latents) if computed else loop.steps.forecast()
                loop.stats.transformers["transformer"].branch("cond").record(number, not computed)
                latents = loop.scheduler.step(output, timestep, latents, return_dict=False)[0]
        loop.steps.finish()
        positions.append((decisions_of(loop), loop.stats.error_control.errors, loop.stats.error_control.passed_on))
    assert positions[0] == positions[1]
    assert positions[0][0][-1]


@settings(max_examples=10)
@given(tolerance=st.floats(0.0, 1.0))
def test_every_tolerance_gives_finite_latents_and_a_full_account(tolerance):
    loop = Loop("SGLang FlowUniPC", STEPS, curved, error_tolerance=tolerance)
    assert bool(torch.isfinite(loop.run()).all())
    decisions = decisions_of(loop)
    assert len(decisions) == STEPS
    assert loop.stats.corrector.corrected_steps == decisions.count(False)


@pytest.mark.parametrize("follows", [0.0, 0.5, 0.75, 1.0])
def test_outputs_that_follow_the_latents_end_three_times_nearer_with_the_corrector(follows):
    """As those of a model do: the output moves with the latents, by so much of what keeps the clean latents."""

    def output(number: int, position: float, latents: torch.Tensor) -> torch.Tensor:
        return curved(number, position, latents) + follows * (latents - noise()) / max(position, 0.05)

    exact = uncached("diffusers Euler", STEPS, output)
    errors = []
    for corrector in (False, True):
        loop = Loop("diffusers Euler", STEPS, output, error_tolerance=0.02, corrector=corrector)
        errors.append(float((loop.run() - exact).norm() / exact.norm()))
        assert not all(decisions_of(loop))
    assert errors[1] < errors[0] / 3


def test_where_transformers_forecast_for_themselves_the_scheduler_is_given_the_carried_forecast():
    """As on the diffusers backend, where each branch extrapolates outputs that no correction has reached."""
    ends, own = [], SimpleNamespace(transformers=())
    for spec, forecast in ((None, None), (own, lambda number, position: torch.full(SHAPE, 7.0))):
        loop = Loop("diffusers Euler", STEPS, curved, error_tolerance=0.02)
        loop.steps.spec = spec
        ends.append(loop.run(forecast=forecast))
        assert loop.stats.corrector.corrected_steps > 0
    assert torch.equal(*ends)
