"""The calibrated promise: exact numbers, and the stated confidence on score distributions that are known."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_cachedit_plugin.tune.promise import TOLERANCES, Promise, largest, tail

PROMISE = Promise(share=0.9, confidence=0.9)


@pytest.mark.parametrize(("share", "confidence", "needed"), [
    (0.95, 0.9, 45), (0.9, 0.9, 22), (0.95, 0.95, 59), (0.99, 0.9, 230), (0.5, 0.5, 1),
])
def test_the_number_of_prompts_that_is_needed(share, confidence, needed):
    promise = Promise(share, confidence)
    assert promise.needed == needed
    assert promise.allowed(needed) == 0 and promise.allowed(needed - 1) == -1


def test_bounds_are_those_of_clopper_and_pearson():
    from scipy.stats import beta, binom

    for missing, count in ((0, 45), (1, 60), (4, 80), (60, 60)):
        assert PROMISE.bound(missing, count) == pytest.approx(
            1.0 if missing == count else beta.ppf(0.9, missing + 1, count - missing)
        )
        assert tail(missing, count, 0.1) == pytest.approx(binom.cdf(missing, count, 0.1))
    for count in (22, 60, 80):
        allowed = PROMISE.allowed(count)
        assert PROMISE.bound(allowed, count) <= 0.1 < PROMISE.bound(allowed + 1, count)


def scores(name: str, draw: np.random.Generator, count: int) -> np.ndarray:
    """PSNR of prompts at each tolerance, (prompts, tolerances)."""
    falling = 60.0 - 12.0 * np.log10(np.array(TOLERANCES) / TOLERANCES[0])
    if name == "normal":
        return falling + draw.normal(0.0, 4.0, (count, 1)) + draw.normal(0.0, 1.0, (count, len(TOLERANCES)))
    if name == "heavy tail":
        return falling - draw.pareto(2.0, (count, 1))
    if name == "some lose their picture":
        return np.where(draw.random((count, 1)) < 0.08, 20.0, falling)
    # Each tolerance has prompts of its own that fail, more of them in the middle.
    rates = 0.02 + 0.15 * np.exp(-((np.arange(len(TOLERANCES)) - 7) ** 2) / 4)
    return np.where(draw.random((count, len(TOLERANCES))) < rates, 20.0, 60.0)


@pytest.mark.parametrize("name", ["normal", "heavy tail", "some lose their picture", "not monotone"])
def test_the_share_holds_with_the_stated_confidence(name):
    draw, least, broken, found = np.random.default_rng(7), 45.0, 0, set()
    rates = (scores(name, draw, 100_000) < least).mean(0)
    for _ in range(1000):
        missed = (scores(name, draw, 60) < least).sum(0)
        chosen = largest(range(len(TOLERANCES)), lambda value, _, missed=missed: int(missed[value]), 60, PROMISE)
        if chosen is not None:
            found.add(chosen[0])
            broken += rates[chosen[0]] > 1.0 - PROMISE.share
    # Three standard deviations of what may be broken by chance.
    assert broken <= 100 + 3 * np.sqrt(1000 * 0.1 * 0.9)
    assert found


def test_the_first_tolerance_that_fails_ends_the_test():
    asked = []

    def missing(value, allowed):
        asked.append(value)
        return {1: 0, 2: 1, 3: 9, 4: 0}[value]

    assert largest([1, 2, 3, 4], missing, 60, PROMISE) == (2, 1)
    assert asked == [1, 2, 3]
    assert largest([3, 4], missing, 60, PROMISE) is None
