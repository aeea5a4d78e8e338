"""Schedules with a given number of computed steps: exact by segment errors, then improved as a whole.

The graph's nodes are computed steps; an edge i -> j leaves out the steps between (LeMiCa, arXiv 2511.00090; DPCache,
arXiv 2602.22654). A path is best by its sorted segment errors compared one by one, the largest first, or by the
sum of their powers (MeanCache, arXiv 2601.19961). Whole schedules are improved by simulated annealing over swaps and
shifts (BudCache, arXiv 2606.13496).
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..cache.forecast import damped_weights
from .surrogate import Mask
from .trajectory import Trajectories

GAMMA = 4.0
Cost = Callable[[int, int, int], float]
"""(computed step before, computed step, next computed step) -> error of leaving out the steps between the last two."""


def segment_costs(trajectories: Trajectories, damping: float = 1.0) -> Cost:
    """Error of the final latents when one segment is left out and all else computed, to first order.

    The segment's steps are extrapolated through the two computed steps before; what they add to the latents
    shrinks or grows to the end as the trajectories' gains say. Mean over prompts, relative to the peak.
    """
    t, steps = trajectories, trajectories.steps
    branches = len(t.parts)
    gram = t.gram.reshape(len(t.gram), branches, steps, branches, steps).sum((1, 3))
    factors = 1.0 + t.change * t.gain
    to_end = np.append(np.cumprod(factors[::-1])[::-1], 1.0)
    known: dict[tuple[int, int], list[float]] = {}

    def errors(before: int, step: int) -> list[float]:
        used = sorted({before, step})
        added, found = np.zeros(steps), [0.0]
        for skipped in range(step + 1, steps):
            places = [float(t.timesteps[each]) for each in used]
            weights = damped_weights(places, float(t.timesteps[skipped]), damping)
            added[used] += t.change[skipped] * np.array(weights)
            added[skipped] -= t.change[skipped]
            size = np.sqrt(np.maximum(np.einsum("t,btu,u->b", added, gram, added), 0.0))
            found.append(float(np.mean(size / t.peak) * abs(to_end[skipped + 1])))
        return found

    def cost(before: int, step: int, following: int) -> float:
        if (before, step) not in known:
            known[before, step] = errors(before, step)
        return known[before, step][following - step - 1]

    return cost


def forecast_costs(trajectories: Trajectories) -> Cost:
    """Relative error of the linear forecast, summed over the steps left out: DPCache's cost of a path's piece.

    In squared distances over all prompts together, as inner products are what is recorded.
    """
    t, whole = trajectories, trajectories.vectors.sum(0)
    sizes = np.linalg.norm(whole, axis=1)

    @functools.cache
    def cost(before: int, step: int, following: int) -> float:
        if following <= step + 1:
            return 0.0
        used, skipped = sorted({before, step}), following - 1
        weights = damped_weights([float(t.timesteps[each]) for each in used], float(t.timesteps[skipped]))
        error = np.linalg.norm(np.array(weights) @ whole[used] - whole[skipped]) / sizes[skipped]
        return cost(before, step, skipped) + float(error)

    return cost


def dpcache(trajectories: Trajectories, budget: int) -> Mask:
    """The schedule of DPCache's planner (arXiv 2602.22654): the path of least summed cost, exact over all masks."""
    mask = shortest(forecast_costs(trajectories), trajectories.steps, budget, minimax=False, gamma=1.0)
    return with_computed(trajectories.starts, mask)


def with_computed(fixed: frozenset[int], mask: Mask) -> Mask:
    """``mask`` with ``fixed`` steps computed, in place of its last others."""
    missing = [step for step in sorted(fixed) if not mask[step]]
    ones = [step for step, computed in enumerate(mask) if computed and step not in fixed]
    changed = list(mask)
    for off, on in zip(reversed(ones), missing, strict=False):
        changed[off], changed[on] = 0, 1
    return tuple(changed)


def shortest(cost: Cost, steps: int, budget: int, *, minimax: bool, gamma: float = GAMMA) -> Mask:
    """The mask with exactly ``budget`` computed steps, the first among them, of least segment errors.

    Exact over all masks: the state is the last two computed steps, which is all that a forecast of order 1 sees.

    Args:
        minimax: compare the sorted errors, the largest first; else the sum of their ``gamma``-th powers.
    """
    if not 1 <= budget <= steps:
        raise ValueError(f"{budget} of {steps} steps cannot be computed")

    def joined(path: tuple[float, ...], error: float) -> tuple[float, ...]:
        if not minimax:
            return (path[0] + error**gamma,)
        return tuple(sorted((*path, error), reverse=True)) if error > 0.0 else path

    empty: tuple[float, ...] = () if minimax else (0.0,)
    best: dict[tuple[int, int], tuple[tuple[float, ...], tuple[int, ...]]] = {(0, 0): (empty, (0,))}
    for _ in range(budget - 1):
        longer: dict[tuple[int, int], tuple[tuple[float, ...], tuple[int, ...]]] = {}
        for (before, step), (path, chosen) in best.items():
            for following in range(step + 1, steps):
                total = joined(path, cost(before, step, following))
                state = (step, following)
                if state not in longer or (total, (*chosen, following)) < longer[state]:
                    longer[state] = (total, (*chosen, following))
        best = longer
    ends = [
        (joined(path, cost(before, step, steps)), chosen) for (before, step), (path, chosen) in best.items()
    ]
    return as_mask(min(ends)[1], steps)


def as_mask(computed: Sequence[int], steps: int) -> Mask:
    """1 at the computed steps."""
    return tuple(int(step in set(computed)) for step in range(steps))


def growing_window(steps: int, budget: int) -> Mask:
    """Computed steps whose gaps grow with the step: the plain baseline of a fixed shape."""
    if budget == 1:
        return as_mask([0], steps)
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        reach = sum(1.0 + middle * number for number in range(budget))
        low, high = (low, middle) if reach > steps else (middle, high)
    places, at = [], 0.0
    for number in range(budget):
        places.append(min(steps - (budget - number), max(round(at), places[-1] + 1 if places else 0)))
        at += 1.0 + low * number
    return as_mask(places, steps)


def shrinking_gaps(steps: int, budget: int, beginning: int = 4, power: float = 1.3) -> Mask:
    """The first steps computed in a row, then gaps that shrink to the end, where the last step is computed."""
    beginning = min(beginning, budget)
    places, rest = list(range(beginning)), budget - beginning
    for number in range(1, rest + 1):
        part = 1.0 - (1.0 - number / rest) ** power
        at = round(beginning - 1 + (steps - beginning) * part)
        places.append(min(steps - 1 - (rest - number), max(at, places[-1] + 1)))
    return as_mask(places, steps)


def moves(mask: Mask, fixed: frozenset[int] = frozenset({0})) -> Iterator[Mask]:
    """All masks one swap of a computed and a cached step away."""
    ones = [step for step, computed in enumerate(mask) if computed and step not in fixed]
    zeros = [step for step, computed in enumerate(mask) if not computed]
    for off in ones:
        for on in zeros:
            yield _swapped(mask, off, on)


def _swapped(mask: Mask, off: int, on: int) -> Mask:
    changed = list(mask)
    changed[off], changed[on] = 0, 1
    return tuple(changed)


def anneal(
    score: Callable[[Mask], float], start: Mask, rounds: int, rng: random.Random,
    fixed: frozenset[int] = frozenset({0}), heat: float = 1.5,
) -> Mask:
    """The best mask met by simulated annealing; shifts of one step and swaps, half each.

    Args:
        score: higher is better, in dB.
        heat: temperature at the start, in dB; it falls linearly to nothing.
    """
    current, best = (score(start), start), (score(start), start)
    for number in range(rounds):
        mask = _random_move(current[1], rng, fixed)
        if mask is None:
            break
        value = score(mask)
        temperature = heat * (1.0 - number / rounds) + 1e-6
        if value >= current[0] or rng.random() < math.exp((value - current[0]) / temperature):
            current = (value, mask)
            best = max(best, current)
    return best[1]


def _random_move(mask: Mask, rng: random.Random, fixed: frozenset[int]) -> Mask | None:
    ones = [step for step, computed in enumerate(mask) if computed and step not in fixed]
    zeros = [step for step, computed in enumerate(mask) if not computed]
    if not ones or not zeros:
        return None
    off = rng.choice(ones)
    if rng.random() < 0.5:
        beside = [step for step in (off - 1, off + 1) if step in zeros]
        return _swapped(mask, off, rng.choice(beside)) if beside else _swapped(mask, off, rng.choice(zeros))
    return _swapped(mask, off, rng.choice(zeros))
