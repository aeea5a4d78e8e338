"""Whether the forward under way is computed or cached: what the plan, the difference and the other ranks say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..report.stats import COND, BranchStats, TransformerStats
from . import rank_agreement
from .runtime import Groups, Identity, TransformerSpec
from .similarity import reduced_differences, residual_difference, residual_sums
from .step_plan import Action


@dataclass
class _Run:
    """Cached steps of a block list so far, in one round of the loop that begins with step ``first``."""

    first: int
    step: int
    cached: int = 0
    streak: int = 0


class Decisions:
    """One request on one transformer, as far as its decisions go; it holds no tensors.

    Which ranks decide together follows from ``groups``, the settings and the place of the forward in its step.
    """

    def __init__(self) -> None:
        self.groups = Groups()
        self.spec: TransformerSpec | None = None
        self.stats: TransformerStats | None = None
        self._identity = Identity(COND, 0)
        self._poisoned: set[str] = set()
        self._forward_in_step = 0
        self._leading: dict[str, tuple[int, float]] = {}
        self._runs: dict[str, _Run] = {}

    def start(self, spec: TransformerSpec, stats: TransformerStats, groups: Groups) -> None:
        """The next forwards run under ``spec`` on ``groups`` and report to ``stats``."""
        self.forget()
        self.spec, self.stats, self.groups = spec, stats, groups
        self._identity, self._forward_in_step = Identity(COND, -1), 0

    def forget(self) -> None:
        """Drop what is known of the branches so far."""
        self._poisoned.clear()
        self._leading.clear()
        self._runs.clear()

    def enter(self, identity: Identity) -> None:
        """The next decisions belong to ``identity``."""
        self._forward_in_step = self._forward_in_step + 1 if identity.step == self._identity.step else 0
        self._identity = identity

    @torch.compiler.disable
    def disable_branch(self, branch: str, why: str = "forwards cannot be told apart") -> None:
        """Compute every further step of ``branch``, and say why."""
        if branch not in self._poisoned:
            self._poisoned.add(branch)
            self.stats.notes.append(f"{branch}: {why}, every step is computed")

    @torch.compiler.disable
    def is_poisoned(self, branch: str) -> bool:
        """Whether every further step of ``branch`` is computed."""
        return branch in self._poisoned

    def computed_last(self, identity: Identity) -> bool:
        """Whether the forward that has just ended was computed."""
        return self.stats.branch(identity.branch).computed[-1:] == [identity.step]

    @property
    def identity(self) -> Identity:
        """The forward under way."""
        return self._identity

    @property
    def branch_stats(self) -> BranchStats:
        """Statistics of the branch under way."""
        assert self.stats is not None
        return self.stats.branch(self._identity.branch)

    @property
    def guarded(self) -> bool:
        """Whether the CFG ranks tell each other when a forward fails.

        The blocks of one branch wait for no rank of another, so every rank comes to the end of its forward and
        can be told. Ranks that share a forward cannot: they wait inside its blocks.
        """
        return self.spec.settings.verify_ranks and self.groups.pair is not None

    @torch.compiler.disable
    def tell(self, failure: Exception | None) -> None:
        """Tell the other CFG ranks whether the forward under way failed.

        Raises:
            RanksDisagreeError: it did on another rank.
        """
        if self._forward_in_step > 0 or getattr(failure, "known_to", None) is self.groups.pair:
            return
        rank_agreement.all_succeeded(self._identity.step, failure, self.groups.pair)

    @property
    def joint(self) -> bool:
        """Whether one decision covers the CFG ranks because their forward is one."""
        return self.groups.pair is not None and self.groups.pair is self.groups.forward

    @property
    def coupled(self) -> bool:
        """Whether this forward's decision is one with those of the other CFG ranks.

        Every CFG rank runs at least one forward a step, but not always as many: the first ones are coupled. Ranks
        that gather weights from one another run as many, or none of them comes to an end.
        """
        return self.groups.couple(self.spec.settings) and (self.groups.gathered or self._forward_in_step == 0)

    def run_of(self, blocks: str) -> _Run:
        """How the run of steps of a block list stands: that of the branch, or of all ranks that decide together.

        What decides whether ranks exchange anything must not be of one branch alone: a rank may change its branch.
        """
        key = blocks if self.coupled else f"{blocks}/{self._identity.branch}"
        run, step = self._runs.get(key), self._identity.step
        if run is None or step < run.step:
            run = self._runs[key] = _Run(first=step, step=step)
        run.step = step
        return run

    @torch.compiler.disable
    def agreed(self, may_cache: bool) -> bool:
        """Whether the forward may be cached, where nothing is measured.

        Ranks of one forward know it alike. CFG ranks that decide together have different branches, and ask each other.
        """
        if not self.coupled:
            return may_cache
        return not rank_agreement.any_rank(not may_cache, self.groups.pair)

    @torch.compiler.disable
    def problem_anywhere(self, own: str | None) -> str | None:
        """What is wrong with the forward that was looked at, on this rank or one that may decide with it.

        Which forwards are looked at follows from the requests so far, which these ranks have in common.

        Raises:
            RanksDisagreeError: the forward failed on another rank.
        """
        group = self.groups.pair or self.groups.forward
        if group is None:
            return own
        if self.guarded:
            self.tell(None)
        return rank_agreement.problems(own or "", group) or None

    @torch.compiler.disable
    def action(self, cached: int = 0, continuous: int = 0) -> Action:
        """What the plan says of the forward under way."""
        plan = self.spec.plan_of(self._identity.branch)
        return plan.action(self._identity.step - self.spec.first_step, cached, continuous)

    @property
    def told(self) -> bool:
        """Whether this forward's decisions are told to other CFG ranks while its blocks run."""
        return self.guarded and (self.coupled or self.joint)

    def verify(self, cached: bool, group: Any, diff: float = math.nan) -> None:
        """Compare a decision with those of the other ranks of ``group``, where the request wants that.

        Args:
            diff: this rank's difference, NaN where none was measured.
        """
        if self.spec.settings.verify_ranks and group is not None:
            rank_agreement.verify(self._identity.step, self._identity.branch, cached, group, diff=diff)

    @property
    def group(self) -> Any:
        """The ranks that decide this forward together, None for this one alone."""
        return self.groups.pair if self.coupled else self.groups.forward

    def _real(self, residual: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, dim) without the padding that makes shards equal."""
        return residual[:, : self.groups.real_tokens(residual.shape[1])] if residual.ndim == 3 else residual

    def measure(
        self, blocks: str, t1: torch.Tensor | None, t2: torch.Tensor, may_cache: bool
    ) -> tuple[float, float, bool]:
        """This branch's difference, the one that decides, and whether no rank must compute.

        Args:
            blocks: the block list whose residual of this step is ``t2``, and of the last computed one ``t1``; None
                where the branch has computed none on this rank.
        """
        if self.group is None:
            diff = residual_difference(t1, t2)
            return diff, diff, True
        shared = self.coupled and not self._separate
        adds = t1 is not None and t1.shape == t2.shape and (not shared or self._identity.branch == COND)
        apart = self.coupled and self._separate
        diffs, compute = reduced_differences(
            residual_sums(self._real(t1), self._real(t2)) if adds else None,
            self.group,
            device=t2.device,
            compute=not may_cache,
            row=self.groups.row if apart else 0,
            rows=self.groups.rows if apart else 1,
        )
        if shared:
            self._leading[blocks] = (self._identity.step, diffs[0])
        # max() may pass over NaN.
        decisive = math.nan if any(math.isnan(each) for each in diffs) else max(diffs)
        return diffs[self.groups.row if apart else 0], decisive, not compute

    def lead(self, blocks: str, diff: float) -> None:
        """The difference of a block list at this step, which other branches may follow."""
        if self._identity.branch == COND:
            self._leading[blocks] = (self._identity.step, diff)

    def new_round(self, blocks: str) -> None:
        """The loop over the steps begins again for this block list."""
        self._leading.pop(blocks, None)

    @property
    def _separate(self) -> bool:
        return self.spec.settings.cfg_diff_compute_separate

    def shared_diff(self, blocks: str) -> float | None:
        """The conditional branch's difference at this step and block list, where the others follow it."""
        if self._separate or self._identity.branch == COND or self.coupled:
            return None
        leading = self._leading.get(blocks)
        if leading is None or leading[0] != self._identity.step:
            return None
        return leading[1]
