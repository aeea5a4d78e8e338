"""Presets, bins and masks turned into plans, for any number of steps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_cachedit_plugin.cache.cached_model import preset_mask
from sglang_cachedit_plugin.cache.step_plan import MIN_SCHEDULE_STEPS, Action, StepPlan, bins_mask, build_plan
from sglang_cachedit_plugin.config.settings import CacheSettings

PRESETS = ("slow", "medium", "fast", "ultra")


def build(num_steps, *, first_step=0, total_steps=None, **knobs):
    return build_plan(
        CacheSettings(**knobs), num_steps, preset_mask, first_step=first_step, total_steps=total_steps
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("num_steps", range(1, 65))
def test_a_preset_for_any_number_of_steps(preset, num_steps):
    plan, notes = build(num_steps, steps_computation_mask=preset)
    if num_steps < MIN_SCHEDULE_STEPS:
        assert plan.mask is None
        assert notes == (f"schedule off: {num_steps} steps, presets and bins need 8",)
        assert plan.may_cache == (num_steps > 4), "the threshold decides on"
        return
    assert not notes
    assert len(plan.mask) == num_steps
    assert set(plan.mask) == {0, 1}
    assert plan.mask[0] == plan.mask[-1] == 1
    assert plan.may_cache


def test_presets_compute_about_the_share_they_promise():
    shares = {name: sum(preset_mask(name, 28)) / 28 for name in PRESETS}
    assert shares["slow"] > shares["medium"] > shares["fast"] > shares["ultra"]
    for name, promised in [("slow", 0.65), ("medium", 0.5), ("fast", 0.38), ("ultra", 0.28)]:
        assert shares[name] == pytest.approx(promised, abs=0.05)


def by_hand(compute, cache, num_steps):
    """One step at a time: which run does it fall into?"""
    edges = []
    for index in range(len(compute)):
        edges += [(1, compute[index])] + ([(0, cache[index])] if index < len(cache) else [])
    mask = []
    for step in range(num_steps):
        rest = step
        for kind, length in edges:
            if rest < length:
                mask.append(kind)
                break
            rest -= length
        else:
            return None
    return tuple(mask)


RUNS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(compute=RUNS, cache=RUNS, num_steps=st.integers(1, 64), same=st.booleans())
def test_bins_are_laid_end_to_end_and_cut(compute, cache, num_steps, same):
    cache = (cache * 6)[: len(compute) - (not same)]
    expected = by_hand(compute, cache, num_steps)
    if expected is None:
        with pytest.raises(ValueError, match=f"cover {sum(compute) + sum(cache)} of {num_steps} steps"):
            bins_mask(compute, cache, num_steps)
    else:
        assert bins_mask(compute, cache, num_steps) == expected


def test_bins_in_a_plan():
    knobs = {"scm_compute_bins": (4, 2), "scm_cache_bins": (3,)}
    assert build(9, **knobs)[0].mask == (1, 1, 1, 1, 0, 0, 0, 1, 1)
    for num_steps, why in [(10, "the bins cover 9 of 10 steps"), (7, "7 steps, presets and bins need 8")]:
        plan, notes = build(num_steps, **knobs)
        assert plan.mask is None
        assert notes == (f"schedule off: {why}",)


def test_huge_bins_cost_no_memory():
    assert bins_mask([10_000] * 10_000, [10_000] * 10_000, 12) == (1,) * 12


def test_a_list_is_taken_as_it_is_or_cut_to_the_expert():
    mask = (1, 1, 0, 1, 0, 0)
    assert build(6, steps_computation_mask=mask)[0].mask == mask
    assert build(2, steps_computation_mask=(1, 0))[0].mask == (1, 0), "lists need no eight steps"
    cut = [
        build(count, steps_computation_mask=mask, first_step=first, total_steps=6)[0].mask
        for first, count in [(0, 4), (4, 2)]
    ]
    assert cut == [(1, 1, 0, 1), (0, 0)]
    own, notes = build(2, steps_computation_mask=(1, 0), first_step=4, total_steps=6)
    assert (own.mask, notes) == ((1, 0), ())
    plan, notes = build(7, steps_computation_mask=mask, total_steps=7)
    assert plan.mask is None
    assert notes == ("schedule off: the mask has 6 entries for 7 steps",)


@pytest.mark.parametrize(
    ("knobs", "warmup"),
    [
        ({"max_warmup_steps": 3}, {0, 1, 2}),
        ({"max_warmup_steps": 0}, set()),
        ({"max_warmup_steps": 99}, set(range(10))),
        ({"max_warmup_steps": 6, "warmup_interval": 2}, {0, 2, 4}),
        # a schedule ends the warmup where it first allows caching
        ({"max_warmup_steps": 6, "steps_computation_mask": (1, 1, 0, 1, 1, 1, 1, 1, 1, 1)}, {0, 1}),
        ({"max_warmup_steps": 1, "steps_computation_mask": (1, 1, 0, 1, 1, 1, 1, 1, 1, 1)}, {0}),
    ],
)
def test_warmup(knobs, warmup):
    plan, _ = build(10, residual_diff_threshold=1.0, **knobs)
    assert plan.warmup == warmup
    assert all(plan.action(step) is Action.COMPUTE for step in warmup)


MASK = (1, 1, 0, 1, 0)
TRUTH = [
    # warmup, mask, static, limits, step, cached, in a row, action
    ({0}, None, False, (-1, -1), 0, 0, 0, Action.COMPUTE),
    ({0}, None, False, (-1, -1), 1, 9, 9, Action.MEASURE),
    ((), None, True, (-1, -1), 1, 0, 0, Action.MEASURE),
    ((), MASK, False, (-1, -1), 1, 0, 0, Action.COMPUTE),
    ((), MASK, False, (-1, -1), 2, 0, 0, Action.MEASURE),
    ((), MASK, True, (-1, -1), 2, 0, 0, Action.CACHE),
    ((), MASK, True, (-1, -1), 3, 0, 0, Action.COMPUTE),
    ({2}, MASK, True, (-1, -1), 2, 0, 0, Action.COMPUTE),
    ((), MASK, True, (0, 0), 2, 5, 5, Action.CACHE),
    ((), MASK, False, (2, -1), 4, 1, 0, Action.MEASURE),
    ((), MASK, False, (2, -1), 4, 2, 0, Action.COMPUTE),
    ((), None, False, (-1, 2), 4, 9, 1, Action.MEASURE),
    ((), None, False, (-1, 2), 4, 9, 2, Action.COMPUTE),
    ((), None, False, (0, -1), 4, 0, 0, Action.COMPUTE),
    ((), MASK, True, (-1, -1), 5, 0, 0, Action.COMPUTE),
    ((), None, False, (-1, -1), -1, 0, 0, Action.COMPUTE),
]


@pytest.mark.parametrize(("warmup", "mask", "static", "limits", "step", "cached", "row", "action"), TRUTH)
def test_the_action_of_a_step(warmup, mask, static, limits, step, cached, row, action):
    plan = StepPlan(
        num_steps=5, warmup=frozenset(warmup), mask=mask, static=static,
        max_cached=limits[0], max_continuous=limits[1],
    )
    assert plan.action(step, cached, row) is action


PLANS = st.fixed_dictionaries(
    {
        "max_warmup_steps": st.integers(0, 6),
        "warmup_interval": st.integers(1, 3),
        "max_cached_steps": st.integers(-1, 6),
        "max_continuous_cached_steps": st.integers(-1, 4),
        "steps_computation_policy": st.sampled_from(["dynamic", "static"]),
    }
)
MASKS = st.one_of(
    st.none(), st.sampled_from(PRESETS),
    st.lists(st.integers(0, 1), min_size=1, max_size=40).filter(any).map(tuple),
)


def walk(plan, similar):
    """Run a plan over all steps; ``similar`` says what a measurement finds."""
    cached, row, ran = 0, 0, []
    for step in range(plan.num_steps):
        action = plan.action(step, cached, row)
        reuse = step > 0 and (action is Action.CACHE or (action is Action.MEASURE and similar[step]))
        cached, row = cached + reuse, row + 1 if reuse else 0
        ran.append((action, reuse))
    return ran


@settings(max_examples=300, deadline=None)
@given(knobs=PLANS, mask=MASKS, num_steps=st.integers(1, 40), data=st.data())
def test_no_plan_breaks_its_limits(knobs, mask, num_steps, data):
    if isinstance(mask, tuple):
        num_steps = len(mask)
    plan, _ = build(num_steps, steps_computation_mask=mask, **knobs)
    similar = data.draw(st.lists(st.booleans(), min_size=num_steps, max_size=num_steps))
    ran = walk(plan, similar)
    row = measured = 0
    for step, (action, reuse) in enumerate(ran):
        if plan.mask is not None and plan.mask[step] == 1:
            assert action is Action.COMPUTE
        if step in plan.warmup:
            assert action is Action.COMPUTE
        row = row + 1 if reuse else 0
        measured += action is Action.MEASURE and reuse
        if not plan.static:
            assert row <= plan.max_continuous or plan.max_continuous < 0
            assert measured <= plan.max_cached or plan.max_cached < 0
    best = walk(plan, [True] * num_steps)
    assert plan.may_cache == any(reuse for _, reuse in best)
