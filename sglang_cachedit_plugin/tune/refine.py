"""From recorded trajectories to a schedule: search on the surrogate, then trial in the real host."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import search, surrogate
from .candidates import OUTPUT, RESIDUAL, STATIC, Candidate, bare_row, cached, row
from .evaluate import Evaluator, Grid, Prompt
from .surrogate import Mask, Method, predict, score
from .trajectory import Trajectories

RECALLS = (0.0, 0.5, 0.9)
METHODS = (Method(order=1, corrector=2), Method(order=1, damping=0.8), Method(fitted=3))
MORE_METHODS = (
    Method(order=1, corrector=1), Method(order=1, damping=0.8, corrector=2), Method(order=2, damping=0.7, corrector=2),
    Method(fitted=3, corrector=2), Method(order=2, damping=0.7),
)
CARRIES = (0.0, 1.0)
"""Tried beside the usual one where the best method corrects."""
ROUNDS = 1500
HEAT = 0.3
"""dB: by how much a trial may be worse than the schedule it came from, at the start."""

FIRST_LOOK = 4
"""Prompts after which a trial that is far behind is given up."""
BEHIND = 1.0
"""dB: how far that is."""
BEGINNINGS = (0.21, 0.14)
"""Parts of the steps of which one is computed in a row from the first step on, where the tuning prompts allow it."""
BEGINNING_PRICE = 1.0
"""dB that this may cost on them: the first steps decide what the picture becomes, and that of a prompt unlike all
tuning prompts may become another one."""
RESIDUAL_LEAD = 0.3
"""dB by which a forecast of the residual must be better than one of the output: its cached steps cost more."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """A schedule as it was tried.

    Args:
        mask: one entry a step, or one after the other those of both CFG branches.
        score: of the final latents in the real host, over the tuning prompts; where the trial was given up, that of
            the trial it was compared with less what it was behind.
        decibels: by prompt, of the prompts that were drawn.
    """

    mask: Mask
    method: Method
    recall: float
    score: float
    decibels: tuple[float, ...]


class Tuner:
    """Finds schedules of one grid. Only the tuning prompts are ever looked at.

    Args:
        evaluations: most trials in the real host for each budget, besides the first of each kind.
        alone: no other grid is in the file; else all schedules have one corrector.
    """

    def __init__(
        self, evaluator: Evaluator, grid: Grid, prompts: Sequence[Prompt], *, seed: int, evaluations: int, say: Say,
        alone: bool = True,
    ):
        self._evaluator, self.grid, self._prompts = evaluator, grid, prompts
        self._seed, self._evaluations, self._say = seed, evaluations, say
        say(f"{grid.label}: recording {len(prompts)} uncached trajectories")
        recorded = evaluator.trajectories(prompts, grid)
        self.by_recall: dict[float, Trajectories] = {each: replace(recorded, recall=each) for each in RECALLS}
        self.starts, self._two_branches = recorded.starts, len(recorded.parts) == 2
        self._alone, shared = alone, 0 if self._two_branches else 2
        self._tried = [each for each in (*METHODS, *MORE_METHODS) if alone or each.corrector == shared]
        self._methods = tuple(self._tried[:2])
        self._known: dict[tuple[Mask, Method, float], Trial] = {}

    def tune(self, budget: int) -> Trial:
        """The best schedule found with ``budget`` computed steps."""
        label = f"{self.grid.label}: {budget} computed steps"
        self._say(f"{label}, schedules from the recorded trajectories")
        firsts = [self._first(budget, recall, method) for method in self._methods for recall in RECALLS]
        self._say(f"{label}, trying {len(set(firsts))} of them in the host")
        best, fixed = self._with_beginning(budget, self._best_of(firsts))
        self._say(f"{label}, {best.score:.1f} dB; {self._evaluations} more trials")
        rng = random.Random(f"{self._seed} {self.grid.label} {budget}")
        best = self._anneal(best, fixed, rng)
        if self._two_branches:
            self._say(f"{label}, {best.score:.1f} dB; a mask of its own for each branch")
            apart = self._apart(best, fixed)
            best = self._anneal(apart, fixed, rng) if len(apart.mask) > len(best.mask) else best
        return best

    def _with_beginning(self, budget: int, best: Trial) -> tuple[Trial, frozenset[int]]:
        """A schedule whose beginning is computed and costs little, else ``best``; and the steps to leave alone.

        Of several that of the least predicted drift in the first half: too long a beginning leaves too little for what
        comes after it.
        """
        allowed = []
        for part in BEGINNINGS:
            fixed = self.starts | frozenset(range(round(part * self.grid.steps)))
            if len(self.starts) < len(fixed) < budget:
                trials = [self._try(*self._first(budget, recall, best.method, fixed), best) for recall in RECALLS[:2]]
                allowed += [(trial, fixed) for trial in trials if trial.score >= best.score - BEGINNING_PRICE]
        return min(allowed, key=lambda each: self._early_drift(each[0]), default=(best, self.starts))

    def _early_drift(self, trial: Trial) -> float:
        predicted = predict(self.by_recall[RECALLS[0]], trial.mask, trial.method)
        return float(predicted.drift[: self.grid.steps // 2].max())

    def compare_methods(self, budget: int) -> list[Trial]:
        """Try every way to forecast the output at one budget, and keep the two best for the others."""
        found: list[Trial] = []
        for method in self._tried:
            recalls = RECALLS[:2] if method in METHODS else RECALLS[1:2]
            found.append(self._best_of([self._first(budget, recall, method) for recall in recalls]))
        found.sort(key=lambda trial: -trial.score)
        if found[0].method.corrector and self._alone:
            carried = [replace(found[0].method, carry=carry) for carry in CARRIES]
            found += [self._best_of([self._first(budget, found[0].recall, method)]) for method in carried]
            found.sort(key=lambda trial: -trial.score)
        self._methods = tuple(trial.method for trial in found[:2])
        return found

    def _best_of(self, firsts: Sequence[tuple[Mask, Method, float]]) -> Trial:
        best = None
        for first in dict.fromkeys(firsts):
            trial = self._try(*first, best)
            best = trial if best is None or trial.score > best.score else best
        return best

    def _first(
        self, budget: int, recall: float, method: Method, fixed: frozenset[int] | None = None
    ) -> tuple[Mask, Method, float]:
        fixed = self.starts if fixed is None else fixed
        trajectories = self.by_recall[recall]
        cost = search.segment_costs(trajectories, method.damping if method.order == 1 else 0.8)
        rng = random.Random(f"{self._seed} {budget} {recall} {method.name}")

        def predicted(mask: Mask) -> float:
            return predict(trajectories, mask, method).score

        starts = [search.shortest(cost, self.grid.steps, budget, minimax=minimax) for minimax in (False, True)]
        starts += [spaced(self.grid.steps, budget) for spaced in (search.growing_window, search.shrinking_gaps)]
        start = max((search.with_computed(fixed, mask) for mask in starts), key=predicted)
        return search.anneal(predicted, start, ROUNDS, rng, fixed), method, recall

    def _apart(self, best: Trial, fixed: frozenset[int]) -> Trial:
        """The best of what the surrogate finds with other masks for the two branches, as many forwards in all."""
        method = Method(order=1, damping=0.8) if best.method.fitted else replace(best.method, corrector=0)
        shared = best.mask
        for recall in RECALLS:
            t = self.by_recall[recall]
            rng = random.Random(f"{self._seed} {recall} {method.name} apart")
            mask = search.anneal(
                lambda mask, t=t: predict(t, mask, method).score, (*shared, *shared), 3 * ROUNDS, rng,
                self._places(fixed),
            )
            if mask[: self.grid.steps] != mask[self.grid.steps :]:
                trial = self._try(mask, method, recall, best)
                best = max(best, trial, key=lambda each: each.score)
        return best

    def _anneal(self, best: Trial, fixed: frozenset[int], rng: random.Random) -> Trial:
        current = best
        for number in range(self._evaluations):
            proposal = self._propose(current, self._places(fixed))
            if proposal is None:
                break
            trial = self._try(proposal, current.method, current.recall, current)
            allowed = HEAT * (1.0 - number / self._evaluations) * rng.random()
            if trial.score > current.score - allowed and len(trial.decibels) == len(self._prompts):
                current = trial
            best = max(best, trial, key=lambda each: each.score)
        return best

    def _places(self, fixed: frozenset[int]) -> frozenset[int]:
        """``fixed`` steps as places of a mask over both branches."""
        return fixed | {step + self.grid.steps for step in fixed}

    def _propose(self, current: Trial, fixed: frozenset[int]) -> Mask | None:
        """The untried neighbour of which the surrogate promises most, over all gains."""
        tried = {mask for mask, _, _ in self._known}
        own = self.by_recall[current.recall]
        fresh = [mask for mask in search.moves(current.mask, fixed) if mask not in tried]
        if not fresh:
            return None
        near = sorted(fresh, key=lambda mask: -predict(own, mask, current.method).score)[:12]
        return max(near, key=lambda mask: sum(predict(t, mask, current.method).score for t in self.by_recall.values()))

    def _try(self, mask: Mask, method: Method, recall: float, rival: Trial | None) -> Trial:
        key = (mask, method, recall if method.fitted else 0.0)
        if key not in self._known:
            request = self.candidate(Trial(mask, method, recall, 0.0, ()), "trial").request
            value, decibels = self._measure(request, rival)
            self._known[key] = Trial(mask, method, recall, value, decibels)
        return self._known[key]

    def _measure(self, request: Mapping[str, Any], rival: Trial | None) -> tuple[float, tuple[float, ...]]:
        """Score and PSNR by prompt; given up early where it is far behind ``rival`` on the same prompts."""
        decibels = self._decibels(self._prompts[:FIRST_LOOK], request)
        if rival is not None and len(decibels) == FIRST_LOOK <= len(rival.decibels):
            behind = score(rival.decibels[:FIRST_LOOK]) - score(decibels)
            if behind > BEHIND:
                return rival.score - behind, tuple(decibels)
        decibels += self._decibels(self._prompts[FIRST_LOOK:], request)
        return score(decibels), tuple(decibels)

    def _decibels(self, prompts: Sequence[Prompt], request: Mapping[str, Any]) -> list[float]:
        found = self._evaluator.measure_all(prompts, self.grid, request, pictures=False)
        return [figures["latent_psnr"] for figures in found]

    def settings(self, mask: Mask, method: Method, recall: float) -> dict[str, Any]:
        """A schedule as ``cache_config``."""
        predicted = predict(self.by_recall[recall], mask, method)
        timesteps = self.by_recall[recall].timesteps
        masks = surrogate.by_branch(mask, self.grid.steps)
        return {
            **OUTPUT, **method.settings,
            "schedules": [row(self.grid.steps, self.grid.size, timesteps, masks, method, predicted.weights)],
        }

    def candidate(self, trial: Trial, name: str) -> Candidate:
        """A trial as a point of the report."""
        settings = self.settings(trial.mask, trial.method, trial.recall)
        predicted = predict(self.by_recall[trial.recall], trial.mask, trial.method)
        masks = surrogate.by_branch(trial.mask, self.grid.steps)
        return cached(
            name, "tuned", f"tuned, {sum(trial.mask) / len(masks):g} computed", settings, method=trial.method,
            mask=_named(masks), computed=_computed(masks), family="tuned",
            drift=tuple(float(each) for each in predicted.drift),
            row=settings["schedules"][0],
        )

    def residual_variants(self, best: Trial) -> list[tuple[Candidate, float, int]]:
        """The same schedule with the blocks' residual forecast in place of the output: score, and on how many prompts.
        """
        masks = surrogate.by_branch(best.mask, self.grid.steps)
        own = bare_row(self.grid.steps, self.grid.size, masks)
        found = []
        for label, settings in RESIDUAL.items():
            knobs = {**STATIC, "forecast": "residual", **settings}
            candidate = cached(
                f"residual: {label}", "tuned", f"tuned mask, {label}", {**knobs, "schedules": [own]},
                mask=_named(masks), computed=_computed(masks), family="tuned", row=own,
            )
            value, decibels = self._measure(candidate.request, best)
            found.append((candidate, value, len(decibels)))
        return found


def _named(masks: Sequence[Mask]) -> Mask | dict[str, Mask]:
    return masks[0] if len(masks) == 1 else {"cond": masks[0], "uncond": masks[1]}


def _computed(masks: Sequence[Mask]) -> float | None:
    """Computed steps over both branches; None where one mask says it."""
    return None if len(masks) == 1 else sum(map(sum, masks)) / len(masks)
