"""Whether memory grows: the slope of the second half, and how sure it is."""

from __future__ import annotations

import random

import pytest

from benchmarks.soak.memory import slope
from benchmarks.soak.soak import verdict

GOOD = {"problems": [], "metrics_wrong": [], "answers": 10}


def samples(
    growth: float, noise: float = 3.0, count: int = 200, settling: float = 0.0, seed: int = 0
) -> list[tuple[float, float]]:
    """MiB over ten minutes: ``growth`` a minute, ``settling`` more in the first half, and noise."""
    made = random.Random(seed)
    ends = 10 / count
    return [
        (ends * index, 1000 + growth * ends * index + settling * min(1.0, 2 * index / count) + made.gauss(0, noise))
        for index in range(count)
    ]


@pytest.mark.parametrize(("growth", "settling"), [(-4.0, 0.0), (0.0, 0.0), (0.4, 0.0), (5.0, 0.0), (0.0, 100.0)])
def test_the_interval_holds_the_true_slope_19_times_in_20(growth, settling):
    """What fills in the first half does not count."""
    found = [slope(samples(growth, settling=settling, seed=seed)) for seed in range(200)]
    held = sum(abs(gradient - growth) <= half for gradient, half in found)
    assert 180 <= held < 200
    assert all(half < 1.5 for _, half in found)


def test_a_leak_an_unsure_run_and_a_short_one_are_refused():
    unsure = [(0.2, 3.0), slope(samples(5.0)), slope(samples(0.0, count=10))]
    assert [len(verdict(GOOD | {"slope_mib_per_minute": found})) for found in unsure] == [1, 1, 1]
    assert unsure[2] is None
    assert verdict(GOOD | {"slope_mib_per_minute": slope(samples(0.0, noise=1.0))}) == []


def test_whatever_else_is_wrong_is_said():
    report = {"problems": ["500"], "metrics_wrong": ["steps"], "answers": 0, "slope_mib_per_minute": (0.0, 0.0)}
    assert verdict(report) == ["500", "steps", "nothing was answered"]
