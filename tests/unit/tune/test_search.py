"""The search: exact against all masks, improved on a known optimum, predicted against a loop that is really run."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_cachedit_plugin.cache.forecast import damped_weights
from sglang_cachedit_plugin.tune import refine, search
from sglang_cachedit_plugin.tune.evaluate import Grid, Prompt
from sglang_cachedit_plugin.tune.surrogate import Method, predict, score
from sglang_cachedit_plugin.tune.trajectory import Trajectories, combine, products

STEPS = 7


def random_cost(seed: int):
    table = np.random.default_rng(seed).random((STEPS + 1, STEPS + 1, STEPS + 1))
    return lambda before, step, following: 0.0 if following == step + 1 else float(table[before, step, following])


def segments(mask, cost) -> list[float]:
    computed = [step for step, one in enumerate(mask) if one]
    ends = [*computed[1:], len(mask)]
    before = [0, *computed[:-1]]
    return [cost(*each) for each in zip(before, computed, ends, strict=True)]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(1, STEPS), minimax=st.booleans())
def test_the_dynamic_programme_finds_the_best_of_all_masks(seed, budget, minimax):
    cost = random_cost(seed)
    found = search.shortest(cost, STEPS, budget, minimax=minimax)
    masks = [search.as_mask((0, *rest), STEPS) for rest in itertools.combinations(range(1, STEPS), budget - 1)]

    def value(mask):
        errors = segments(mask, cost)
        return sorted((e for e in errors if e > 0), reverse=True) if minimax else sum(e**4 for e in errors)

    assert found in masks
    best = min(map(value, masks))
    assert value(found) == (best if minimax else pytest.approx(best, rel=1e-12))


@given(steps=st.integers(1, 60), data=st.data())
def test_a_growing_window_grows(steps, data):
    budget = data.draw(st.integers(1, steps))
    mask = search.growing_window(steps, budget)
    assert len(mask) == steps and sum(mask) == budget and mask[0] == 1
    computed = [step for step, one in enumerate(mask) if one]
    gaps = [after - before for before, after in itertools.pairwise(computed)]
    assert all(later >= earlier - 1 for earlier, later in itertools.pairwise(gaps))


def test_every_swap_is_a_move_and_the_first_step_stays():
    found = list(search.moves((1, 1, 0, 0)))
    assert sorted(found) == [(1, 0, 0, 1), (1, 0, 1, 0)]


def test_annealing_finds_a_known_optimum():
    best = search.as_mask([0, 2, 3, 7, 11, 12], 14)

    def likeness(mask):
        return -float(sum(one != other for one, other in zip(mask, best, strict=True)))

    start = search.as_mask(range(6), 14)
    assert search.anneal(likeness, start, 400, random.Random(1)) == best
    first = search.anneal(likeness, start, 25, random.Random(2))
    assert search.anneal(likeness, start, 25, random.Random(2)) == first


SIGMAS = np.array([1.0, 0.9, 0.78, 0.6, 0.45, 0.25, 0.1])
CHANGE = np.append(SIGMAS[1:], 0.0) - SIGMAS


LINEAR = Method(1)


def loop(start: np.ndarray, field, mask=(1,) * STEPS, method=LINEAR):
    """Euler's method with forecasts, really run: inputs, outputs and the final state."""
    x, known, inputs, outputs, cached = start, [], [], [], []
    for step in range(STEPS):
        inputs.append(x)
        if mask[step]:
            output = field(step, x)
            known.append((1000 * SIGMAS[step], output))
            if cached and method.corrector:
                y, used = inputs[cached[0]], known[-(method.corrector + 1):]
                for each in cached:
                    weights = damped_weights([place for place, _ in used], 1000 * SIGMAS[each])
                    y = y + CHANGE[each] * sum(w * value for w, (_, value) in zip(weights, used, strict=True))
                output = output + method.carry * (y - x) / SIGMAS[step]
                x = y
            cached = []
        else:
            cached.append(step)
            used = known[-(method.order + 1):]
            weights = damped_weights([place for place, _ in used], 1000 * SIGMAS[step], method.damping)
            output = sum(weight * value for weight, (_, value) in zip(weights, used, strict=True))
        outputs.append(output)
        x = x + CHANGE[step] * output
    return np.stack(inputs), np.stack(outputs), x


def recorded(field, count=3) -> tuple[Trajectories, list[np.ndarray]]:
    starts = [np.random.default_rng(seed).normal(size=40) for seed in range(count)]
    runs = [loop(start, lambda step, x, b=b: field(b, step, x)) for b, start in enumerate(starts)]
    return Trajectories(
        timesteps=1000 * SIGMAS, change=CHANGE, gram=np.stack([products(run[1]) for run in runs]),
        peak=np.array([np.ptp(run[2]) for run in runs]),
    ), starts


def wavy(prompt, step, x):
    direction = np.random.default_rng(prompt).normal(size=(2, 40))
    return direction[0] * np.cos(4 * SIGMAS[step]) + direction[1] * SIGMAS[step] ** 2


MASK = (1, 1, 0, 1, 0, 0, 1)


@pytest.mark.parametrize("method", [
    Method(1), Method(2, 0.6), Method(1, corrector=1), Method(1, corrector=2, carry=0.0), Method(2, 0.7, corrector=2),
])
def test_the_predicted_error_is_that_of_the_loop_where_drift_stays(method):
    trajectories, starts = recorded(wavy)
    found = predict(trajectories, MASK, method)
    for prompt, start in enumerate(starts):
        exact = loop(start, lambda step, x, p=prompt: wavy(p, step, x))[2]
        real = loop(start, lambda step, x, p=prompt: wavy(p, step, x), MASK, method)[2]
        error = np.mean((real - exact) ** 2) / np.ptp(exact) ** 2
        assert found.decibels[prompt] == pytest.approx(-10 * np.log10(error + 1e-7), abs=1e-6)


def test_the_predicted_error_is_that_of_the_loop_where_drift_vanishes():
    def towards(prompt, step, x):
        return (x - 3.0 * wavy(prompt, step, x)) / SIGMAS[step]

    trajectories, starts = recorded(towards)
    mask = (1, 1, 0, 1, 0, 1, 0)
    found = predict(replace(trajectories, recall=1.0), mask, Method(1))
    for prompt, start in enumerate(starts):
        exact = loop(start, lambda step, x, p=prompt: towards(p, step, x))[2]
        real = loop(start, lambda step, x, p=prompt: towards(p, step, x), mask, Method(1))[2]
        error = np.mean((real - exact) ** 2) / np.ptp(exact) ** 2
        assert found.decibels[prompt] == pytest.approx(-10 * np.log10(error + 1e-7), abs=1e-6)


def test_all_computed_is_without_error_and_fitted_weights_beat_the_polynomial():
    trajectories, _ = recorded(wavy)
    assert predict(trajectories, (1,) * STEPS, Method(1)).decibels.min() == pytest.approx(70.0)
    fitted = predict(trajectories, MASK, Method(fitted=3))
    assert fitted.score > predict(trajectories, MASK, Method(1)).score + 3.0
    assert [len(row) for row in fitted.weights] == [2, 3, 3]


def test_nothing_is_corrected_over_the_start_of_another_transformer():
    trajectories, _ = recorded(wavy)
    mask = (1, 1, 0, 1, 1, 0, 1)
    two = replace(trajectories, starts=frozenset({0, 3}))
    plain, corrected = (predict(two, mask, Method(1, corrector=order)) for order in (0, 1))
    # What was cached just before it stays, what was cached after it is corrected.
    assert corrected.drift[3] == pytest.approx(plain.drift[3])
    assert corrected.drift[6] != pytest.approx(plain.drift[6])
    whole = [predict(trajectories, mask, Method(1, corrector=order)).drift[3] for order in (0, 1)]
    assert whole[0] != pytest.approx(whole[1])


def test_shrinking_gaps_begin_in_a_row_and_end_with_the_last_step():
    for steps, budget in ((28, 14), (28, 10), (50, 12), (6, 4), (7, 7), (5, 1)):
        mask = search.shrinking_gaps(steps, budget)
        assert sum(mask) == budget and mask[: min(4, budget)] == (1,) * min(4, budget)
        assert mask[-1] == 1 or budget <= 4
    places = [step for step, computed in enumerate(search.shrinking_gaps(50, 12)) if computed]
    gaps = np.diff(places[3:])
    assert gaps[0] > gaps[-1] and all(before >= after - 1 for before, after in itertools.pairwise(gaps))


def test_nothing_is_extrapolated_over_the_start_of_another_transformer():
    trajectories, _ = recorded(wavy)
    two = replace(trajectories, starts=frozenset({0, 3}))
    found = predict(two, (1, 1, 1, 1, 0, 1, 1), Method(2))
    assert found.weights == ((1.0,),)
    # A step that begins a transformer is computed whatever the mask says.
    assert predict(two, (1, 1, 1, 0, 0, 1, 1), Method(2)).decibels == pytest.approx(found.decibels)


def test_segment_costs_are_zero_next_to_each_other_and_grow_with_the_gap():
    trajectories, _ = recorded(lambda prompt, step, x: np.exp(3 * SIGMAS[step]) * wavy(prompt, 0, x))
    cost = search.segment_costs(trajectories)
    assert cost(0, 1, 2) == 0.0
    assert 0.0 < cost(0, 1, 3) < cost(0, 1, 4) < cost(0, 1, 6)


def test_dpcache_plans_the_path_of_least_summed_forecast_error():
    trajectories, _ = recorded(wavy)
    outputs = np.concatenate([np.stack([wavy(b, step, None) for step in range(STEPS)]) / trajectories.peak[b]
                              for b in range(3)], axis=1)

    def total(mask):
        known, found = [], 0.0
        for step, computed in enumerate(mask):
            if computed:
                known.append(step)
                continue
            used = known[-2:]
            weights = damped_weights([SIGMAS[each] for each in used], SIGMAS[step])
            error = sum(w * outputs[each] for w, each in zip(weights, used, strict=True)) - outputs[step]
            found += np.linalg.norm(error) / np.linalg.norm(outputs[step])
        return found

    masks = [(1, *rest) for rest in itertools.product((0, 1), repeat=STEPS - 1)]
    for budget in range(2, STEPS + 1):
        least = min(total(mask) for mask in masks if sum(mask) == budget)
        assert total(search.dpcache(trajectories, budget)) == pytest.approx(least, abs=1e-9)
    two = replace(trajectories, starts=frozenset({0, 4}))
    assert search.dpcache(two, 3)[4] == 1 and sum(search.dpcache(two, 3)) == 3


def test_guidance_is_found_from_the_latents():
    rng = np.random.default_rng(0)
    cond, uncond = rng.normal(size=(2, STEPS, 50))
    mixed = uncond + 4.0 * (cond - uncond)
    places = np.cumsum(np.concatenate([rng.normal(size=(1, 50)), CHANGE[:, None] * mixed]), axis=0)
    velocity, change, parts = combine({"cond": cond, "uncond": uncond}, places[:-1], places[-1], 1000 * SIGMAS)
    np.testing.assert_allclose(velocity.sum(0), mixed, atol=1e-8)
    np.testing.assert_allclose(velocity[0], 4.0 * cond, atol=1e-8)
    np.testing.assert_allclose(parts, (4.0, -3.0))
    np.testing.assert_allclose(change, CHANGE)


def test_without_comparable_latents_the_first_branch_stands_for_all():
    outputs = np.ones((STEPS, 5))
    velocity, change, parts = combine({"cond": outputs}, np.ones((STEPS, 9)), np.ones(5), 1000 * SIGMAS)
    np.testing.assert_array_equal(velocity[0], outputs)
    assert parts == (1.0,)
    np.testing.assert_allclose(change, CHANGE)


def test_the_score_leans_to_the_worst():
    assert score([40.0, 40.0]) == 40.0
    assert score([60.0, 20.0]) == pytest.approx(35.0)


def two_branches(parts=(4.0, -3.0)) -> Trajectories:
    """A conditional and an unconditional branch whose outputs do not hang on the latents."""
    grams, peaks = [], []
    for prompt in range(3):
        values = np.stack([
            part * np.stack([wavy(10 * prompt + branch, step, None) for step in range(STEPS)])
            for branch, part in enumerate(parts)
        ])
        grams.append(products(values))
        start = np.random.default_rng(prompt).normal(size=40)
        peaks.append(np.ptp(start + CHANGE @ values.sum(0)))
    return Trajectories(
        timesteps=1000 * SIGMAS, change=CHANGE, gram=np.stack(grams), peak=np.array(peaks), parts=parts
    )


def test_masks_of_two_branches_are_predicted_as_each_alone():
    t, other = two_branches(), (1, 1, 1, 0, 0, 1, 0)
    assert predict(t, (*MASK, *MASK), LINEAR).decibels == pytest.approx(predict(t, MASK, LINEAR).decibels, abs=1e-6)
    found = predict(t, (*MASK, *other), LINEAR)
    for prompt in range(3):
        drift = np.zeros(40)
        for branch, (part, mask) in enumerate(zip(t.parts, (MASK, other), strict=True)):
            def field(step, x, p=10 * prompt + branch, part=part):
                return part * wavy(p, step, x)

            drift += loop(np.zeros(40), field, mask)[2] - loop(np.zeros(40), field)[2]
        error = np.mean(drift**2) / t.peak[prompt] ** 2
        assert found.decibels[prompt] == pytest.approx(-10 * np.log10(error + 1e-7), abs=1e-6)


def test_a_branch_that_hardly_changes_gives_its_steps_to_the_other():
    t = two_branches((4.0, -0.01))
    start = (*MASK, *MASK)
    fixed = frozenset({0, STEPS})
    mask = search.anneal(lambda each: predict(t, each, LINEAR).score, start, 1000, random.Random(1), fixed)
    assert sum(mask) == sum(start) and mask[0] == mask[STEPS] == 1
    assert sum(mask[:STEPS]) > sum(mask[STEPS:])
    assert predict(t, mask, LINEAR).score > predict(t, MASK, LINEAR).score + 3.0


class Predicted:
    """In place of the evaluator: trials go exactly as predicted without recall."""

    def __init__(self, trajectories):
        self.t = trajectories

    def trajectories(self, prompts, grid):
        return self.t

    def measure_all(self, prompts, grid, more, *, pictures):
        (row,) = more["cache_dit_params"]["schedules"]
        masks = [tuple(map(int, row[name])) for name in ("mask", "uncond_mask") if name in row]
        assert all(len(mask) == self.t.steps for mask in masks)
        params = more["cache_dit_params"]
        corrector = params["corrector_order"] if params.get("corrector") else 0
        method = Method(row.get("order", 0), row.get("damping", 1.0), 0, corrector, params.get("corrector_carry", 0.5))
        found = predict(self.t, tuple(itertools.chain(*masks)), method)
        return [{"latent_psnr": each} for each in found.decibels[: len(prompts)]]


def test_the_tuner_finds_a_mask_for_each_branch_and_forecasts_residuals_with_both(monkeypatch):
    monkeypatch.setattr(refine, "ROUNDS", 60)
    prompts = [Prompt(text, seed) for seed, text in enumerate("abc")]
    trials = Predicted(two_branches((4.0, -0.01)))
    tuner = refine.Tuner(trials, Grid(STEPS, (64, 64)), prompts, seed=1, evaluations=2, say=lambda text: None)
    best = tuner.tune(4)
    assert len(best.mask) == 2 * STEPS and sum(best.mask) == 8
    assert best.mask[:STEPS] != best.mask[STEPS:]
    for candidate, _, _ in tuner.residual_variants(best):
        assert candidate.computed == 4
        assert candidate.row["mask"] != candidate.row["uncond_mask"]
        assert sum(map(int, candidate.row["mask"] + candidate.row["uncond_mask"])) == 8


def late_turns():
    """One branch, 24 steps; the outputs hardly turn at first, so computing the beginning is a waste."""
    places = np.linspace(1.0, 1 / 24, 24)
    rng = np.random.default_rng(2)
    grams, peaks = [], []
    for _ in range(3):
        axes = rng.normal(size=(3, 40))
        outputs = axes[0] + np.outer(1.0 - places, axes[1]) + np.outer(np.sin(9 * (1.0 - places) ** 3), axes[2])
        grams.append(outputs @ outputs.T / 40)
        peaks.append(np.ptp(outputs.mean(0)))
    return Trajectories(
        timesteps=1000 * places, change=np.full(24, -1 / 24), gram=np.stack(grams), peak=np.array(peaks)
    )


@pytest.fixture
def begun(monkeypatch):
    """A trial with 10 of 24 steps, given the price and the parts of a beginning."""
    monkeypatch.setattr(refine, "ROUNDS", 60)
    prompts = [Prompt(text, seed) for seed, text in enumerate("abc")]

    def tune(price, *parts):
        monkeypatch.setattr(refine, "BEGINNING_PRICE", price)
        monkeypatch.setattr(refine, "BEGINNINGS", parts)
        trials, grid = Predicted(late_turns()), Grid(24, (64, 64))
        return refine.Tuner(trials, grid, prompts, seed=1, evaluations=0, say=lambda _: None).tune(10)

    return tune


def test_the_beginning_is_computed_in_a_row_for_no_more_than_its_price(begun):
    free, whole = begun(-100.0, 0.21), begun(100.0, 0.21)
    assert sum(whole.mask) == 10 and whole.mask[:5] == (1,) * 5
    assert free.mask[:3] != (1, 1, 1)
    assert free.score - whole.score > 0.1
    for price in (0.05, 0.2, 0.5, 1.0, 2.0):
        found = begun(price, 0.21)
        assert found.score >= free.score - price
        assert found.mask == free.mask or found.mask[:5] == (1,) * 5


def test_of_two_beginnings_that_of_less_early_drift_is_taken(begun):
    def early(trial):
        return predict(late_turns(), trial.mask, trial.method).drift[:12].max()

    short, long, either = begun(100.0, 0.14), begun(100.0, 0.3), begun(100.0, 0.3, 0.14)
    assert short.mask[:3] == (1,) * 3 and long.mask[:7] == (1,) * 7
    assert early(short) != early(long)
    assert either.mask == min((short, long), key=early).mask
