"""From recorded trajectories to a schedule: search on the surrogate, then trial in the real host."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import search, surrogate
from .candidates import STATIC, Candidate, cached, row
from .evaluate import Evaluator, Grid, Prompt
from .surrogate import Mask, Method, foretell, score
from .trajectory import Trajectories

RECALLS = (0.0, 0.5, 0.9)
METHODS = (Method(order=1, damping=0.8), Method(fitted=3))
MORE_METHODS = (Method(order=2, damping=0.7), Method(order=3, damping=0.5), Method(order=1))
ROUNDS = 400
HEAT = 0.3
"""dB: by how much a trial may be worse than the schedule it came from, at the start."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """A schedule as it was tried.

    Args:
        score: of the final latents in the real host, over the tuning prompts.
    """

    mask: Mask
    method: Method
    recall: float
    score: float
    decibels: tuple[float, ...]


class Tuner:
    """Finds schedules of one grid.

    Args:
        evaluations: most trials in the real host for each budget, besides the first of each kind.
    """

    def __init__(
        self, evaluator: Evaluator, grid: Grid, prompts: Sequence[Prompt], *, seed: int, evaluations: int, say: Say
    ):
        self._evaluator, self.grid, self._prompts = evaluator, grid, prompts
        self._seed, self._evaluations, self._say = seed, evaluations, say
        say(f"{grid.label}: recording {len(prompts)} uncached trajectories")
        recorded = evaluator.trajectories(prompts, grid)
        self.by_recall: dict[float, Trajectories] = {each: replace(recorded, recall=each) for each in RECALLS}
        self.fixed = recorded.starts
        self._methods = METHODS
        self._known: dict[tuple[Mask, Method, float], Trial] = {}

    def tune(self, budget: int) -> Candidate:
        """The best schedule found with ``budget`` computed steps."""
        grid = self.grid
        self._say(f"{grid.label}: {budget} computed steps, schedules from the recorded trajectories")
        firsts = [self._first(budget, recall, method) for method in self._methods for recall in RECALLS]
        self._say(f"{grid.label}: {budget} computed steps, trying {len(set(firsts))} of them in the host")
        trials = [self._try(*first) for first in dict.fromkeys(firsts)]
        best = max(trials, key=lambda trial: trial.score)
        self._say(f"{grid.label}: {budget} computed steps, {best.score:.1f} dB; {self._evaluations} more trials")
        best = self._anneal(best, random.Random(f"{self._seed} {grid.label} {budget}"))
        return self.candidate(best, f"tuned-{budget}")

    def compare_methods(self, budget: int) -> list[Trial]:
        """Try every way to forecast the output at one budget, and keep the two best for the others."""
        found = []
        for method in (*METHODS, *MORE_METHODS):
            recalls = RECALLS[:2] if method in METHODS else RECALLS[1:2]
            trials = [self._try(*self._first(budget, recall, method)) for recall in recalls]
            found.append(max(trials, key=lambda trial: trial.score))
        found.sort(key=lambda trial: -trial.score)
        self._methods = tuple(trial.method for trial in found[:2])
        return found

    def _first(self, budget: int, recall: float, method: Method) -> tuple[Mask, Method, float]:
        trajectories = self.by_recall[recall]
        cost = search.segment_costs(trajectories, method.damping if method.order == 1 else 0.8)
        rng = random.Random(f"{self._seed} {budget} {recall} {method.name}")

        def foretold(mask: Mask) -> float:
            return foretell(trajectories, mask, method).score

        starts = [self._with_fixed(search.shortest(cost, self.grid.steps, budget, minimax=minimax))
                  for minimax in (False, True)]
        starts.append(self._with_fixed(search.growing_window(self.grid.steps, budget)))
        start = max(starts, key=foretold)
        return search.anneal(foretold, start, ROUNDS, rng, self.fixed), method, recall

    def _with_fixed(self, mask: Mask) -> Mask:
        missing = [step for step in sorted(self.fixed) if not mask[step]]
        ones = [step for step, computed in enumerate(mask) if computed and step not in self.fixed]
        changed = list(mask)
        for off, on in zip(reversed(ones), missing, strict=False):
            changed[off], changed[on] = 0, 1
        return tuple(changed)

    def _anneal(self, best: Trial, rng: random.Random) -> Trial:
        current = best
        for number in range(self._evaluations):
            proposal = self._propose(current)
            if proposal is None:
                break
            trial = self._try(proposal, current.method, current.recall)
            allowed = HEAT * (1.0 - number / self._evaluations) * rng.random()
            if trial.score > current.score - allowed:
                current = trial
            best = max(best, trial, key=lambda each: each.score)
        return best

    def _propose(self, current: Trial) -> Mask | None:
        """The untried neighbour of which the surrogate promises most, over all gains."""
        tried = {mask for mask, _, _ in self._known}
        fresh = [mask for mask in search.moves(current.mask, self.fixed) if mask not in tried]
        if not fresh:
            return None
        own = self.by_recall[current.recall]
        near = sorted(fresh, key=lambda mask: -foretell(own, mask, current.method).score)[:12]
        return max(near, key=lambda mask: sum(foretell(t, mask, current.method).score for t in self.by_recall.values()))

    def _try(self, mask: Mask, method: Method, recall: float) -> Trial:
        key = (mask, method, recall if method.fitted else 0.0)
        if key not in self._known:
            request = self.candidate(Trial(mask, method, recall, 0.0, ()), "trial").request
            decibels = tuple(
                self._evaluator.measure(prompt, self.grid, request, pictures=False)["latent_psnr"]
                for prompt in self._prompts
            )
            self._known[key] = Trial(mask, method, recall, score(decibels), decibels)
        return self._known[key]

    def settings(self, mask: Mask, method: Method, recall: float) -> dict[str, Any]:
        """A schedule as ``cache_config``."""
        foretold = foretell(self.by_recall[recall], mask, method)
        timesteps = self.by_recall[recall].timesteps
        return {
            "forecast": "output", **STATIC,
            "schedules": [row(self.grid.steps, self.grid.size, timesteps, mask, method, foretold.weights)],
        }

    def candidate(self, trial: Trial, name: str) -> Candidate:
        """A trial as a point of the report."""
        settings = self.settings(trial.mask, trial.method, trial.recall)
        foretold = foretell(self.by_recall[trial.recall], trial.mask, trial.method)
        spread = surrogate.spread(self.by_recall[trial.recall], trial.mask, trial.method)
        return cached(
            name, "tuned", f"tuned, {sum(trial.mask)} computed", settings, mask=trial.mask, method=trial.method,
            drift=tuple(float(each) for each in foretold.drift), family="tuned",
            row=settings["schedules"][0] | {"spread": [round(float(each), 5) for each in spread]},
        )

    def residual_variants(self, mask: Mask) -> list[Candidate]:
        """The same schedule with the blocks' residual forecast in place of the output."""
        shared = {**STATIC, "steps_computation_mask": list(mask), "forecast": "residual"}
        kinds: dict[str, dict[str, Any]] = {
            "last residual": {}, "TaylorSeer 1": {"enable_taylorseer": True, "taylorseer_order": 1},
            "TaylorSeer 2": {"enable_taylorseer": True, "taylorseer_order": 2}, "DMD": {"enable_dmd": True},
            "TaylorSeer 1, F 2": {"enable_taylorseer": True, "taylorseer_order": 1, "Fn_compute_blocks": 2},
        }
        return [
            cached(f"residual: {label}", "baseline", f"tuned mask, {label}", {**shared, **settings}, mask=mask,
                   family="tuned mask, residual")
            for label, settings in kinds.items()
        ]

    def trial_score(self, candidate: Candidate) -> float:
        """Score of any candidate over the tuning prompts."""
        return score([
            self._evaluator.measure(prompt, self.grid, candidate.request, pictures=False)["latent_psnr"]
            for prompt in self._prompts
        ])
