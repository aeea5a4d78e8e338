"""One cache-dit context for each (block list, CFG branch), found by identity.

cache-dit tells branches apart by counting forward calls. Here the host names the branch and the step of
every forward, so a context can only ever see its own branch, whatever the order or number of calls.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager

from ..report.stats import TransformerStats
from .branch_context import BranchContext
from .decisions import Decisions
from .inputs import Given, differ
from .runtime import Groups, Identity, TransformerSpec
from .step_plan import Action


class BranchContexts(Decisions, CachedContextManager):
    """cache-dit's context manager, keyed by block list and branch.

    cache-dit's blocks call it in this order: ``set_context``, first blocks, ``mark_step_begin``,
    ``can_cache``, then either ``add_cached_step`` and ``apply_cache`` or ``set_Fn_buffer``, middle blocks
    and ``set_Bn_buffer``.

    Args:
        name: shown in cache-dit's log lines.
    """

    def __init__(self, name: str):
        CachedContextManager.__init__(self, name=name, persistent_context=True)
        Decisions.__init__(self)
        self.on_decision: Callable[[bool], None] | None = None
        self._outcomes: list[bool] = []
        self.given: Given = {}
        """The form of what the forward under way is given."""
        self._received: dict[str, tuple[int, Given]] = {}
        self._changes: defaultdict[str, list[int]] = defaultdict(list)

    def begin_request(self, spec: TransformerSpec, stats: TransformerStats, groups: Groups) -> None:
        """Forget every context; the next forwards run under ``spec`` on ``groups`` and report to ``stats``."""
        self.clear()
        self.start(spec, stats, groups)

    def clear(self) -> None:
        """Drop all contexts with their tensors."""
        self.clear_contexts()
        self._current_context = None
        self._received.clear()
        self._changes.clear()
        self.forget()

    @torch.compiler.disable
    def repeat_values(self, steps: Iterable[int]) -> None:
        """As if ``steps`` had computed what the last one did: calibrators have the history that they ask for."""
        for step in steps:
            for context in self._cached_context_manager.values():
                for calibrator in filter(None, context.get_calibrators()):
                    calibrator.repeat(step, float(step))

    def held_bytes(self) -> int:
        """Bytes of the tensors in all contexts and their calibrators."""
        return sum(context.held_bytes() for context in self._cached_context_manager.values())

    @torch.compiler.disable
    def receive(self, identity: Identity) -> bool:
        """Whether the inputs of a branch have another form than before; what it holds is then dropped."""
        branch, step = identity.branch, identity.step
        last, before = self._received.get(branch, (step, self.given))
        self._received[branch] = step, self.given
        if not differ(before, self.given):
            return False
        for context in self._cached_context_manager.values():
            if context.branch == branch:
                context.start_over(self.spec.settings)
        if step > last:
            # Otherwise the loop over the steps has begun again, and nothing is kept anyway.
            changes = self._changes[branch]
            changes.append(step)
            steps = f"step{'s' * (len(changes) > 1)} {', '.join(map(str, changes))}"
            self.stats.remark(
                f"{branch} input", f"{branch}: its input changed shape or dtype at {steps}, computed anew"
            )
        return True

    @torch.compiler.disable
    def begin_forward(self, identity: Identity) -> None:
        """The next calls belong to ``identity``."""
        self.enter(identity)
        self._outcomes = []

    @torch.compiler.disable
    def end_forward(self) -> None:
        """Record the finished forward: cached where every block list was."""
        self.branch_stats.record(self._identity.step, bool(self._outcomes) and all(self._outcomes))

    @torch.compiler.disable
    def record(self, *, cached: bool) -> None:
        """Note the forward under way, where no block list decided it: the branches' plans may differ."""
        self.verify(cached, self.groups.forward, self._diff())
        self.branch_stats.record(self._identity.step, cached)

    def set_context(self, cached_context: Any, *args: Any, **kwargs: Any) -> BranchContext:
        """The context of block list ``cached_context`` for the branch under way."""
        assert self.spec is not None
        key = f"{cached_context}/{self._identity.branch}"
        context = self._cached_context_manager.get(key)
        if context is None or self._identity.step < context.last_step:
            # A step before the last one is a new round of the loop: nothing of the old one may be seen.
            self.new_round(str(cached_context))
            context = BranchContext.create(key, str(cached_context), self._identity.branch, self.spec)
            self._cached_context_manager[key] = context
        self._current_context = context
        return context

    @torch.compiler.disable
    def mark_step_begin(self) -> None:
        """Set the context's counters to the host's step instead of counting."""
        context, step = self._current_context, self._identity.step
        context.repeated = step == context.last_step
        if context.repeated:
            self.disable_branch(self._identity.branch)
        context.last_step = step
        context.executed_steps = context.transformer_executed_steps = step + 1
        for calibrator in context.get_calibrators():
            if calibrator is not None:
                calibrator.at(step, self.spec.position(step))

    @torch.compiler.disable
    def can_cache(
        self,
        states_tensor: torch.Tensor,
        parallelized: bool = False,
        threshold: float | None = None,
        prefix: str = "Fn",
    ) -> bool:
        """Whether the middle blocks may be left out of this forward."""
        if self.told:
            self.tell(None)
        cached = self._decide(states_tensor, prefix)
        self.verify(cached, self.group, self._diff())
        context = self._current_context
        if self.coupled or not context.repeated:
            # A second forward that cannot be told from the first must not part ranks whose plans go by the run.
            run = self.run_of(context.blocks)
            run.streak = run.streak + 1 if cached else 0
        if not cached:
            context.evict_oldest()
        self._outcomes.append(cached)
        if self.on_decision is not None:
            self.on_decision(cached)
        return cached

    def _diff(self) -> float:
        """The difference that was measured for the forward under way, NaN for none."""
        context = self._current_context
        measured = context is not None and context.last_diff is not None
        return context.last_diff[1] if measured and context.last_diff[0] == self._identity.step else math.nan

    def _decide(self, residual: torch.Tensor, prefix: str) -> bool:
        context, run = self._current_context, self.run_of(self._current_context.blocks)
        action = self.action(run.cached, run.streak)
        if action is Action.COMPUTE or run.first == run.step:
            return False
        may_cache = (
            context.has_reference
            and self._identity.branch not in self._poisoned
            and context.residual_shape == residual.shape
        )
        if action is Action.CACHE:
            return self.agreed(may_cache)
        reference = self.get_Fn_buffer(prefix) if context.has_reference else None
        limit = self.spec.settings.max_accumulated_residual_diff_threshold
        may_cache = may_cache and not (limit and context.accumulated_residual_diff >= limit)
        return self._similar(reference, residual, self.spec.settings.residual_diff_threshold, may_cache)

    @torch.compiler.disable
    def similarity(
        self, t1: torch.Tensor, t2: torch.Tensor, *, threshold: float, parallelized: bool = False,
        prefix: str = "Fn",
    ) -> bool:
        """Whether the residual ``t2`` of this step is within ``threshold`` of the stored ``t1``."""
        return self._similar(t1, t2, threshold, True)

    def _similar(self, t1: torch.Tensor | None, t2: torch.Tensor, threshold: float, may_cache: bool) -> bool:
        """As ``similarity``.

        Args:
            may_cache: False where this rank computes whatever the difference. The ranks of its group may not know
                (the branch may be new to this rank, or its shard alone has another shape), so it takes part in their
                decision.
        """
        if threshold <= 0.0:
            return False
        if threshold >= 1.0:
            return self.agreed(may_cache)
        context, step = self._current_context, self._identity.step
        diff = decisive = self.shared_diff(context.blocks)
        if diff is None:
            if not may_cache and self.group is None:
                return False
            diff, decisive, may_cache = self.measure(context.blocks, t1, t2, may_cache)
        self.lead(context.blocks, diff)
        if t1 is None or t1.shape != t2.shape:
            return False
        self.branch_stats.measured(step, diff)
        context.last_diff = (step, diff)
        if math.isfinite(diff):
            context.accumulated_residual_diff += diff
        return may_cache and decisive < threshold

    @torch.compiler.disable
    def add_cached_step(self) -> None:
        """Count a cached step of the block list."""
        self.run_of(self._current_context.blocks).cached += 1

    @torch.compiler.disable
    def set_Fn_buffer(self, buffer: torch.Tensor, prefix: str = "Fn") -> None:  # noqa: N802
        """Store the residual of the first blocks, where a later step may be measured against it."""
        self._current_context.residual_shape = buffer.shape
        if not self.spec.plan.static:
            super().set_Fn_buffer(buffer, prefix)

    @torch.compiler.disable
    def set_Bn_buffer(self, buffer: torch.Tensor, prefix: str = "Bn") -> None:  # noqa: N802
        """Store the residual of the middle blocks; from here on the context can be reused."""
        super().set_Bn_buffer(buffer, prefix)
        self._current_context.has_reference = True
