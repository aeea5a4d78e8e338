"""Schedules for steps and sizes that were not tuned."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_cachedit_plugin.config.tuned_schedules import TunedSchedule, choose, resample

MASKS = st.lists(st.integers(0, 1), min_size=1, max_size=60).map(lambda rest: (1, *rest))


def falling(count: int, bend: float) -> list[float]:
    return [1000.0 * (1 - step / count) ** bend for step in range(count)]


@given(mask=MASKS, steps=st.integers(1, 120), bend=st.floats(0.3, 3.0), known=st.booleans())
def test_the_share_of_computed_steps_and_the_first_step_are_kept(mask, steps, bend, known):
    places = (falling(len(mask), bend), falling(steps, bend)) if known else (None, None)
    new = resample(mask, steps, *places)
    assert len(new) == steps and new[0] == 1
    assert sum(new) == min(steps, max(1, round(steps * sum(mask) / len(mask))))


@given(mask=MASKS, bend=st.floats(0.3, 3.0))
def test_the_same_path_gives_the_same_mask(mask, bend):
    assert resample(mask, len(mask)) == mask
    assert resample(mask, len(mask), falling(len(mask), bend), falling(len(mask), bend)) == mask


@given(mask=MASKS, factor=st.integers(2, 4))
def test_back_from_a_finer_grid_comes_the_mask(mask, factor):
    assert resample(resample(mask, factor * len(mask)), len(mask)) == mask


def test_computed_steps_stay_at_their_timesteps():
    tuned = (1, 1, 1, 1, 0, 0, 0, 0, 0, 0)
    # The new path spends twice as many steps above 600 as the tuned one.
    old = [1000.0 - 100 * step for step in range(10)]
    new = [1000.0 - 50 * step for step in range(8)] + [600.0, 300.0]
    assert resample(tuned, 10, old, new) == (1, 0, 1, 0, 1, 0, 1, 0, 0, 0)
    assert resample(tuned, 10) == tuned


ROWS = [
    TunedSchedule(
        steps=4, size=(64, 64), mask=(1, 1, 0, 0), weights=((1.0,), (1.0,)), timesteps=(9.0, 6.0, 3.0, 1.0), damping=0.5
    ),
    TunedSchedule(steps=4, size=(512, 512), mask=(1, 0, 1, 0)),
    TunedSchedule(steps=8, size=(64, 64), mask=(1, 1, 1, 1, 0, 0, 0, 0)),
]


@pytest.mark.parametrize("row", ROWS)
def test_what_was_tuned_is_taken_as_it_is(row):
    assert choose(ROWS, row.steps, row.size, row.timesteps) == (row, None)
    assert choose(ROWS, row.steps, row.size, None) == (row, None)


def test_the_nearest_steps_come_before_the_nearest_size():
    found, note = choose(ROWS, 5, (500, 400), None)
    assert found.steps == 5 and sum(found.mask) == 2
    assert note == (
        "no schedule was tuned for 5 steps 500x400: the one for 4 steps 512x512 is resampled over the step number, "
        "2 steps computed"
    )
    assert choose(ROWS, 9, (512, 512), None)[1].count("8 steps 64x64") == 1


def test_fitted_weights_hold_for_their_timesteps_only():
    found, note = choose(ROWS, 4, (64, 64), (9.0, 8.0, 7.0, 1.0))
    assert found.weights is None and found.damping == 0.5
    assert "with these timesteps" in note and "resampled over timesteps" in note
    assert choose(ROWS, 4, (64, 64), (9.0, 6.01, 3.0, 1.0))[0].weights == ROWS[0].weights
