"""What each branch has computed, and whether its forward under way is computed or cached.

cache-dit tells branches apart by counting forward calls. Here the host names the branch and the step of every
forward, so a state only ever sees its own branch, whatever the order or number of calls.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config.settings import CacheSettings
from ..errors import Reason
from ..report.stats import COND, BranchStats, TransformerStats
from . import rank_agreement
from .compiling import untraced
from .dmd import DMDForecaster
from .forecast import Extrapolator
from .inputs import Given, differ
from .similarity import reduced_differences, residual_difference, residual_sums
from .spec import Groups, Identity, TransformerSpec
from .step_plan import Action


def _forecaster(settings: CacheSettings) -> Extrapolator | DMDForecaster:
    """What is kept of the middle blocks' residuals: without a calibrator, the last one."""
    if settings.calibrator == "dmd":
        return DMDForecaster(
            settings.dmd_history, settings.dmd_rank, settings.dmd_ridge, single=settings.dmd_svd_precision == "low"
        )
    return Extrapolator(settings.taylorseer_order if settings.calibrator == "taylorseer" else 0)


@dataclass
class BranchState:
    """What one block list keeps of one branch.

    Args:
        first: residual of the first blocks at the last computed step, None where no step is measured.
        shape: its shape.
        middle: residuals of the middle blocks by stream.
        absent: streams that the middle blocks returned as None.
        last_diff: the last step that was measured, and its difference.
    """

    blocks: str
    branch: str
    measured: str
    last_step: int = -1
    last_diff: tuple[int, float] | None = None
    accumulated_diff: float = 0.0
    first: torch.Tensor | None = None
    shape: torch.Size | None = None
    middle: dict[str, Extrapolator | DMDForecaster] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)

    @property
    def ready(self) -> bool:
        """Whether a computed step was kept."""
        return self.measured in self.middle and len(self.middle[self.measured]) > 0

    def start_over(self) -> None:
        """Forget what was computed; what was counted stays."""
        self.first = self.shape = None
        self.middle.clear()
        self.absent.clear()

    def held_bytes(self) -> int:
        first = 0 if self.first is None else self.first.nbytes
        return first + sum(each.held_bytes() for each in self.middle.values())


@dataclass
class _Run:
    """Cached steps of a block list so far, in one round of the loop that begins with step ``first``."""

    first: int
    step: int
    cached: int = 0
    streak: int = 0


class BranchCache:
    """The branches of one transformer during one request.

    Which ranks decide together follows from ``groups``, the settings and the place of the forward in its step.

    Attributes:
        given: the form of what the forward under way is given.
        on_decision: told of each block list's decision.
    """

    def __init__(self) -> None:
        self.groups = Groups()
        self.spec: TransformerSpec | None = None
        self.stats: TransformerStats | None = None
        self.given: Given = {}
        self.on_decision: Callable[[bool], None] | None = None
        self._identity = Identity(COND, 0)
        self._forward_in_step = 0
        self._states: dict[tuple[str, str], BranchState] = {}
        self._current: BranchState | None = None
        self._outcomes: list[bool] = []
        self._disabled: set[str] = set()
        self._leading: dict[str, tuple[int, float]] = {}
        self._runs: dict[tuple[str, str], _Run] = {}
        self._received: dict[str, tuple[int, Given]] = {}
        self._changes: defaultdict[str, list[int]] = defaultdict(list)

    def begin_request(self, spec: TransformerSpec, stats: TransformerStats, groups: Groups) -> None:
        """The next forwards run under ``spec`` on ``groups`` and report to ``stats``."""
        self.clear()
        self.spec, self.stats, self.groups = spec, stats, groups
        self._identity, self._forward_in_step = Identity(COND, -1), 0

    def clear(self) -> None:
        """Drop all that is known of the branches, with its tensors."""
        self._current = None
        for each in (self._states, self._disabled, self._leading, self._runs, self._received, self._changes):
            each.clear()

    def held_bytes(self) -> int:
        return sum(state.held_bytes() for state in self._states.values())

    @property
    def request(self) -> TransformerSpec:
        assert self.spec is not None
        return self.spec

    @property
    def _reported(self) -> TransformerStats:
        assert self.stats is not None
        return self.stats

    @property
    def _branch_stats(self) -> BranchStats:
        return self._reported.branch(self._identity.branch)

    # One forward: receive, begin_forward, decide (for each block list), end_forward or record.

    @untraced
    def receive(self, identity: Identity) -> bool:
        """Whether the inputs of a branch have another form than before; what it holds is then dropped."""
        branch, step = identity.branch, identity.step
        last, before = self._received.get(branch, (step, self.given))
        self._received[branch] = step, self.given
        if not differ(before, self.given):
            return False
        for state in self._states.values():
            if state.branch == branch:
                state.start_over()
        if step > last:
            # Otherwise the loop over the steps has begun again, and nothing is kept anyway.
            changes = self._changes[branch]
            changes.append(step)
            steps = f"step{'s' * (len(changes) > 1)} {', '.join(map(str, changes))}"
            why = f"{branch}: its input changed shape or dtype at {steps}, computed anew"
            self._reported.remark(f"{branch} input", Reason("input", why))
        return True

    @untraced
    def begin_forward(self, identity: Identity) -> None:
        self._forward_in_step = self._forward_in_step + 1 if identity.step == self._identity.step else 0
        self._identity = identity
        self._outcomes = []

    @untraced
    def end_forward(self) -> None:
        """Record the finished forward: cached where every block list was."""
        self._branch_stats.record(self._identity.step, bool(self._outcomes) and all(self._outcomes))

    @untraced
    def record(self, *, cached: bool) -> None:
        """Note the forward under way, where no block list decided it: the branches' plans may differ."""
        self._verify(cached, self.groups.forward)
        self._branch_stats.record(self._identity.step, cached)

    def computed_last(self, identity: Identity) -> bool:
        """Whether the forward that has just ended was computed."""
        return self._reported.branch(identity.branch).computed[-1:] == [identity.step]

    @untraced
    def disable_branch(self, branch: str, why: str = "forwards cannot be told apart") -> None:
        """Compute every further step of ``branch``, and say why."""
        if branch not in self._disabled:
            self._disabled.add(branch)
            self._reported.notes.append(f"{branch}: {why}, every step is computed")

    # What the middle blocks of a computed step added, and what they would add on a cached one.

    def note(self, state: BranchState, stream: str, residual: torch.Tensor | None) -> None:
        """Keep a stream's residual of the step under way; None: the blocks returned none."""
        state.absent.discard(stream)
        if residual is None:
            state.absent.add(stream)
            return
        if stream not in state.middle:
            state.middle[stream] = _forecaster(self.request.settings)
        step = self._identity.step
        state.middle[stream].update(self.request.position(step), residual, step)

    def forecast(self, state: BranchState, stream: str) -> torch.Tensor | None:
        """The residual of a stream at the step under way."""
        if stream in state.absent:
            return None
        step = self._identity.step
        return state.middle[stream].predict(self.request.position(step), step=step)

    @untraced
    def repeat_values(self, steps: Iterable[int]) -> None:
        """As if ``steps`` had computed what the last one did: forecasts have the history that they ask for."""
        for step in steps:
            for state in self._states.values():
                for known in state.middle.values():
                    known.update(float(step), known.latest, step)

    # Decisions.

    def decide(self, blocks: str, measured: str, residual: torch.Tensor) -> tuple[BranchState, bool]:
        """The state of a block list for the branch under way, and whether its middle blocks may be left out.

        Args:
            blocks: name of the list.
            measured: the stream of which a residual must be kept before any step is cached.
            residual: what the first blocks added to it, (batch, tokens, dim).
        """
        key, step = (blocks, self._identity.branch), self._identity.step
        state = self._states.get(key)
        if state is None or step < state.last_step:
            # A step before the last one is a new round of the loop: nothing of the old one may be seen.
            self._leading.pop(blocks, None)
            state = self._states[key] = BranchState(blocks, self._identity.branch, measured)
        self._current = state
        repeated, state.last_step = step == state.last_step, step
        if repeated:
            self.disable_branch(state.branch)
        if self.told:
            self.tell(None)
        cached = self._may_cache(state, residual)
        self._verify(cached, self._group)
        run = self._run_of(blocks)
        if self.coupled or not repeated:
            # A second forward that cannot be told from the first must not part ranks whose plans go by the run.
            run.streak = run.streak + 1 if cached else 0
        run.cached += cached
        if not cached:
            # Free what this step will replace, before its blocks run.
            for known in state.middle.values():
                known.evict_oldest()
            state.shape = residual.shape
            state.first = None if self.request.plan.static else residual
        self._outcomes.append(cached)
        if self.on_decision is not None:
            self.on_decision(cached)
        return state, cached

    def _may_cache(self, state: BranchState, residual: torch.Tensor) -> bool:
        run, settings = self._run_of(state.blocks), self.request.settings
        action = self.action(run.cached, run.streak)
        if action is Action.COMPUTE or run.first == run.step:
            return False
        may_cache = state.ready and state.branch not in self._disabled and state.shape == residual.shape
        if action is Action.CACHE:
            return self._agreed(may_cache)
        limit = settings.max_accumulated_residual_diff_threshold
        may_cache = may_cache and not (limit and state.accumulated_diff >= limit)
        return self._similar(state, residual, settings.residual_diff_threshold, may_cache)

    def _similar(self, state: BranchState, residual: torch.Tensor, threshold: float, may_cache: bool) -> bool:
        """Whether the residual of this step is within ``threshold`` of the kept one.

        Args:
            may_cache: False where this rank computes whatever the difference. The ranks of its group may not know
                (the branch may be new to this rank, or its shard alone has another shape), so it takes part in their
                decision.
        """
        if threshold <= 0.0:
            return False
        if threshold >= 1.0:
            return self._agreed(may_cache)
        reference, step = state.first if state.ready else None, self._identity.step
        shared = self._shared_diff(state.blocks)
        if shared is not None:
            diff = decisive = shared
        elif not may_cache and self._group is None:
            return False
        else:
            diff, decisive, may_cache = self._measure(state.blocks, reference, residual, may_cache)
        if state.branch == COND:
            self._leading[state.blocks] = (step, diff)
        if reference is None or reference.shape != residual.shape:
            return False
        self._branch_stats.measured(step, diff)
        state.last_diff = (step, diff)
        if math.isfinite(diff):
            state.accumulated_diff += diff
        return may_cache and decisive < threshold

    @untraced
    def action(self, cached: int = 0, continuous: int = 0) -> Action:
        plan = self.request.plan_of(self._identity.branch)
        return plan.action(self._identity.step - self.request.first_step, cached, continuous)

    @untraced
    def cached_by_plan(self, ready: bool) -> bool:
        """Whether a schedule caches the forward under way and nothing speaks against it.

        Args:
            ready: whether this rank has what a cached step needs.
        """
        return self._agreed(ready and self._identity.branch not in self._disabled)

    def _run_of(self, blocks: str) -> _Run:
        """How the run of steps of a block list stands: that of the branch, or of all ranks that decide together.

        What decides whether ranks exchange anything must not be of one branch alone: a rank may change its branch.
        """
        key = (blocks, "" if self.coupled else self._identity.branch)
        run, step = self._runs.get(key), self._identity.step
        if run is None or step < run.step:
            run = self._runs[key] = _Run(first=step, step=step)
        run.step = step
        return run

    def _measure(
        self, blocks: str, reference: torch.Tensor | None, residual: torch.Tensor, may_cache: bool
    ) -> tuple[float, float, bool]:
        """This branch's difference, the one that decides, and whether no rank must compute.

        Args:
            reference: residual of the last computed step, None where the branch has computed none on this rank.
        """
        if self._group is None:
            assert reference is not None
            diff = residual_difference(reference, residual)
            return diff, diff, True
        separate, groups = self.request.settings.cfg_diff_compute_separate, self.groups
        shared, apart = self.coupled and not separate, self.coupled and separate
        sums, adds = None, not shared or self._identity.branch == COND
        if adds and reference is not None and reference.shape == residual.shape:
            sums = residual_sums(self._real(reference), self._real(residual))
        rank, ranks = (groups.cfg_rank, groups.cfg_ranks) if apart else (0, 1)
        diffs, compute = reduced_differences(
            sums, self._group, device=residual.device, compute=not may_cache, rank=rank, ranks=ranks
        )
        if shared:
            self._leading[blocks] = (self._identity.step, diffs[0])
        # max() may pass over NaN.
        decisive = math.nan if any(math.isnan(each) for each in diffs) else max(diffs)
        return diffs[rank], decisive, not compute

    def _real(self, residual: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, dim) without the padding that makes shards equal."""
        return residual[:, : self.groups.real_tokens(residual.shape[1])] if residual.ndim == 3 else residual

    def _shared_diff(self, blocks: str) -> float | None:
        """The conditional branch's difference at this step and block list, where the others follow it."""
        if self.request.settings.cfg_diff_compute_separate or self._identity.branch == COND or self.coupled:
            return None
        step, diff = self._leading.get(blocks, (None, math.nan))
        return diff if step == self._identity.step else None

    # Ranks.

    @property
    def coupled(self) -> bool:
        """Whether this forward's decision is one with those of the other CFG ranks.

        Every CFG rank runs at least one forward a step, but not always as many: the first ones are coupled. Ranks
        that gather weights from one another run as many, or none of them comes to an end.
        """
        return self.groups.couple(self.request.settings) and (self.groups.gathered or self._forward_in_step == 0)

    @property
    def guarded(self) -> bool:
        """Whether the CFG ranks tell each other when a forward fails.

        The blocks of one branch wait for no rank of another, so every rank comes to the end of its forward and
        can be told. Ranks that share a forward cannot: they wait inside its blocks.
        """
        return self.request.settings.verify_ranks and self.groups.cfg_group is not None

    @property
    def told(self) -> bool:
        """Whether this forward's decisions are told to other CFG ranks while its blocks run."""
        return self.guarded and (self.coupled or self.groups.cfg_group is self.groups.forward)

    @property
    def _group(self) -> Any:
        """The ranks that decide this forward together, None for this one alone."""
        return self.groups.cfg_group if self.coupled else self.groups.forward

    @untraced
    def tell(self, failure: Exception | None) -> None:
        """Tell the other CFG ranks whether the forward under way failed.

        Raises:
            RanksDisagreeError: it did on another rank.
        """
        if self._forward_in_step > 0 or getattr(failure, "known_to", None) is self.groups.cfg_group:
            return
        rank_agreement.all_succeeded(self._identity.step, failure, self.groups.cfg_group)

    def _agreed(self, may_cache: bool) -> bool:
        """Whether the forward may be cached, where nothing is measured.

        Ranks of one forward know it alike. CFG ranks that decide together have different branches, and ask each other.
        """
        return not rank_agreement.any_rank(not may_cache, self.groups.cfg_group) if self.coupled else may_cache

    @untraced
    def problem_anywhere(self, own: str | None) -> str | None:
        """What is wrong with the forward that was looked at, on this rank or one that may decide with it.

        Which forwards are looked at follows from the requests so far, which these ranks have in common.

        Raises:
            RanksDisagreeError: the forward failed on another rank.
        """
        group = self.groups.cfg_group or self.groups.forward
        if group is None:
            return own
        if self.guarded:
            self.tell(None)
        return rank_agreement.problems(own or "", group) or None

    def _verify(self, cached: bool, group: Any) -> None:
        """Compare a decision with those of the other ranks of ``group``, where the request wants that."""
        if self.request.settings.verify_ranks and group is not None:
            step, diff = (None, math.nan) if self._current is None else self._current.last_diff or (None, math.nan)
            rank_agreement.verify(
                self._identity.step, self._identity.branch, cached, group,
                diff=diff if step == self._identity.step else math.nan,
            )
