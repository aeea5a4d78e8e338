"""The part of masks and tuned schedules that a run takes."""

from __future__ import annotations

import pytest

from sglang_cachedit_plugin.cache.stretch import Stretch
from sglang_cachedit_plugin.config.tuned_schedules import TunedSchedule

PATH = tuple(1000.0 - 100.0 * step for step in range(10))


def stretch(first: int = 0, count: int | None = None, path=PATH, **given) -> Stretch:
    return Stretch(timesteps=path, first=first, count=len(path) - first if count is None else count, **{
        "asked": len(path), **given
    })


@pytest.mark.parametrize(
    ("run", "mask", "expected"),
    [
        (stretch(), "1101010100", "1101010100"),
        (stretch(6), "1101010100", "1100"),
        (stretch(6, 2), "1101010100", "11"),
        (stretch(6), "1010", "1010"),
        (stretch(6), "10101", "10101"),
        # Two evaluations a step, but one for the last.
        (stretch(path=PATH[:9], asked=5, order=2), "11010", "111100110"),
        (stretch(4, path=PATH[:9], asked=5, order=2), "11010", "10110"),
        # PNDM evaluates one step more than it was asked for.
        (stretch(asked=9), "110101010", "1101010100"),
    ],
)
def test_a_mask_is_cut_to_the_run(run, mask, expected):
    assert run.mask([int(step) for step in mask]) == tuple(int(step) for step in expected)


def test_a_row_is_cut_with_all_that_belongs_to_its_steps():
    row = TunedSchedule(
        steps=10, mask=(1, 1, 0, 1, 0, 1, 0, 1, 0, 0), uncond_mask=(1, 0, 1, 0, 1, 0, 1, 0, 1, 0), order=2,
        weights=((0.1,), (0.2,), (0.3,), (0.4, 0.6), (0.5, 0.5)), timesteps=PATH,
    )
    assert stretch().row(row) is row
    part = stretch(4).row(row)
    assert part == TunedSchedule(
        steps=6, mask=(1, 1, 0, 1, 0, 0), uncond_mask=(1, 0, 1, 0, 1, 0), order=2, timesteps=PATH[4:],
        weights=((0.3,), (0.4, 0.6), (0.5, 0.5)),
    )
    # Of the outputs that steps 8 and 9 count, the run has one.
    assert stretch(6).row(row).weights == ((), ())
