"""One cache-dit context for each (block list, CFG branch), found by identity.

cache-dit tells branches apart by counting forward calls. Here the host names the branch and the step of
every forward, so a context can only ever see its own branch, whatever the order or number of calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from cache_dit import DBCacheConfig, DMDCalibratorConfig, TaylorSeerCalibratorConfig
from cache_dit.caching.cache_contexts.cache_context import CachedContext
from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager

from . import agreement
from .dmd import DMDForecaster
from .forecast import Extrapolator
from .runtime import Groups, Identity, TransformerSpec
from .schedule import Action
from .settings import CacheSettings
from .similarity import reduced_differences, residual_difference, residual_sums
from .stats import COND, BranchStats, TransformerStats


class _Forecaster:
    """A calibrator slot of cache-dit that extrapolates on the real spacing."""

    def __init__(self, order: int):
        self._order = order
        self._values: dict[str, Extrapolator] = {}
        self.position = 0.0

    def at(self, step: int, position: float) -> None:
        """Move to a step before it is computed or approximated."""
        self.position = position

    def update(self, value: torch.Tensor, name: str = "default") -> None:
        """Add a computed value."""
        self._values.setdefault(name, Extrapolator(self._order)).update(self.position, value)

    def approximate(self, name: str = "default") -> torch.Tensor:
        """The forecast at the current step."""
        return self._values[name].predict(self.position)

    def make_room(self) -> None:
        """Drop what the next computed value will push out."""
        for values in self._values.values():
            values.make_room()

    def held_bytes(self) -> int:
        """Bytes of the values kept."""
        return sum(values.held_bytes() for values in self._values.values())


class _SteppedDMD:
    """A calibrator slot of cache-dit that forecasts by the modes of the computed values."""

    def __init__(self, settings: CacheSettings):
        self._settings = settings
        self._values: dict[str, DMDForecaster] = {}
        self._at = (0, 0.0)

    def at(self, step: int, position: float) -> None:
        """Move to a step before it is computed or approximated."""
        self._at = (step, position)

    def update(self, value: torch.Tensor, name: str = "default") -> None:
        """Add a computed value."""
        if name not in self._values:
            settings = self._settings
            self._values[name] = DMDForecaster(
                settings.dmd_history, settings.dmd_rank, settings.dmd_ridge,
                single=settings.dmd_svd_precision == "low",
            )
        self._values[name].update(*self._at, value)

    def approximate(self, name: str = "default") -> torch.Tensor:
        """The forecast at the current step."""
        return self._values[name].predict(*self._at)

    def make_room(self) -> None:
        """Drop what the next computed value will push out."""
        for values in self._values.values():
            values.make_room()

    def held_bytes(self) -> int:
        """Bytes of the values kept."""
        return sum(values.held_bytes() for values in self._values.values())


def _calibrator_config(settings: CacheSettings) -> TaylorSeerCalibratorConfig | DMDCalibratorConfig | None:
    if settings.calibrator == "taylorseer":
        return TaylorSeerCalibratorConfig(taylorseer_order=settings.taylorseer_order)
    if settings.calibrator == "dmd":
        return DMDCalibratorConfig(
            dmd_history=settings.dmd_history,
            dmd_rank=settings.dmd_rank,
            dmd_ridge=settings.dmd_ridge,
            dmd_svd_precision=settings.dmd_svd_precision,
        )
    return None


def _new_calibrator(settings: CacheSettings) -> _Forecaster | _SteppedDMD | None:
    if settings.calibrator == "taylorseer":
        return _Forecaster(settings.taylorseer_order)
    if settings.calibrator == "dmd":
        return _SteppedDMD(settings)
    return None


@dataclass
class BranchContext(CachedContext):
    """cache-dit's context of one block list and branch, with what our decision needs on top."""

    blocks: str = ""
    last_step: int = -1
    last_diff: tuple[int, float] | None = None
    streak: int = 0
    cached_count: int = 0
    has_reference: bool = False
    absent: set[str] = field(default_factory=set)
    residual_shape: torch.Size | None = None

    def make_room(self) -> None:
        """Free what the computed step that begins now will replace, before its blocks run."""
        for name in [name for name in self.buffers if "_Bn_" in name]:
            del self.buffers[name]
        for calibrator in self.get_calibrators():
            if calibrator is not None:
                calibrator.make_room()

    @classmethod
    def create(cls, name: str, blocks: str, spec: TransformerSpec) -> BranchContext:
        """An empty context of block list ``blocks`` for one request."""
        settings = spec.settings
        context = cls(
            name=name,
            blocks=blocks,
            cache_config=DBCacheConfig(
                Fn_compute_blocks=settings.Fn_compute_blocks,
                Bn_compute_blocks=settings.Bn_compute_blocks,
                residual_diff_threshold=settings.residual_diff_threshold,
                enable_separate_cfg=False,
            ),
            calibrator_config=_calibrator_config(settings),
        )
        context.calibrator = _new_calibrator(settings)
        context.encoder_calibrator = _new_calibrator(settings)
        return context


def _tensor_bytes(context: BranchContext) -> int:
    buffers = [each for each in context.buffers.values() if isinstance(each, torch.Tensor)]
    calibrators = [each for each in context.get_calibrators() if each is not None]
    return sum(each.numel() * each.element_size() for each in buffers) + sum(c.held_bytes() for c in calibrators)


class BranchContexts(CachedContextManager):
    """cache-dit's context manager, keyed by block list and branch.

    cache-dit's blocks call it in this order: ``set_context``, first blocks, ``mark_step_begin``,
    ``can_cache``, then either ``add_cached_step`` and ``apply_cache`` or ``set_Fn_buffer``, middle blocks
    and ``set_Bn_buffer``.

    Args:
        name: shown in cache-dit's log lines.
    """

    def __init__(self, name: str):
        super().__init__(name=name, persistent_context=True)
        self.groups = Groups()
        self.spec: TransformerSpec | None = None
        self.stats: TransformerStats | None = None
        self.on_decision: Callable[[bool], None] | None = None
        self._identity = Identity(COND, 0)
        self._outcomes: list[bool] = []
        self._poisoned: set[str] = set()
        self._forward_in_step = 0
        self._leading: dict[str, tuple[int, float]] = {}

    def begin_request(self, spec: TransformerSpec, stats: TransformerStats, groups: Groups) -> None:
        """Forget every context; the next forwards run under ``spec`` on ``groups`` and report to ``stats``."""
        self.clear()
        self.spec, self.stats, self.groups = spec, stats, groups
        self._identity, self._forward_in_step = Identity(COND, -1), 0

    def clear(self) -> None:
        """Drop all contexts with their tensors."""
        self.clear_contexts()
        self._current_context = None
        self._poisoned.clear()
        self._leading.clear()

    def held_bytes(self) -> int:
        """Bytes of the tensors in all contexts and their calibrators."""
        return sum(_tensor_bytes(context) for context in self._cached_context_manager.values())

    @torch.compiler.disable
    def begin_forward(self, identity: Identity) -> None:
        """The next calls belong to ``identity``."""
        self._enter(identity)
        self._outcomes = []

    def _enter(self, identity: Identity) -> None:
        self._forward_in_step = self._forward_in_step + 1 if identity.step == self._identity.step else 0
        self._identity = identity

    @torch.compiler.disable
    def end_forward(self) -> None:
        """Record the finished forward: cached where every block list was."""
        self.branch_stats.record(self._identity.step, bool(self._outcomes) and all(self._outcomes))

    @torch.compiler.disable
    def poison(self, branch: str, why: str = "forwards cannot be told apart") -> None:
        """Compute every further step of ``branch``, and say why."""
        if branch not in self._poisoned:
            self._poisoned.add(branch)
            self.stats.notes.append(f"{branch}: {why}, every step is computed")

    @torch.compiler.disable
    def is_poisoned(self, branch: str) -> bool:
        """Whether every further step of ``branch`` is computed."""
        return branch in self._poisoned

    @torch.compiler.disable
    def record(self, *, cached: bool) -> None:
        """Note the forward under way, where no block list decided it: the branches' plans may differ."""
        self._verify(cached, self.groups.forward)
        self.branch_stats.record(self._identity.step, cached)

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

    def set_context(self, cached_context: Any, *args: Any, **kwargs: Any) -> BranchContext:
        """The context of block list ``cached_context`` for the branch under way."""
        assert self.spec is not None
        key = f"{cached_context}/{self._identity.branch}"
        context = self._cached_context_manager.get(key)
        if context is None or self._identity.step < context.last_step:
            # A step before the last one is a new round of the loop: nothing of the old one may be seen.
            self._leading.pop(str(cached_context), None)
            context = BranchContext.create(key, str(cached_context), self.spec)
            self._cached_context_manager[key] = context
        self._current_context = context
        return context

    @torch.compiler.disable
    def mark_step_begin(self) -> None:
        """Set the context's counters to the host's step instead of counting."""
        context, step = self._current_context, self._identity.step
        context.repeated = step == context.last_step
        if context.repeated:
            self.poison(self._identity.branch)
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
        if self.guarded and (self._coupled or self._joint):
            self.tell(None)
        cached = self._decide(states_tensor, prefix)
        self._verify(cached, self._group)
        context = self._current_context
        if not context.repeated:
            # A second forward that cannot be told from the first must not part ranks whose plans go by the run.
            context.streak = context.streak + 1 if cached else 0
        if not cached:
            context.make_room()
        self._outcomes.append(cached)
        if self.on_decision is not None:
            self.on_decision(cached)
        return cached

    def _verify(self, cached: bool, group: Any) -> None:
        if not self.spec.settings.verify_ranks or group is None:
            return
        step, context = self._identity.step, self._current_context
        measured = context is not None and context.last_diff is not None and context.last_diff[0] == step
        diff = context.last_diff[1] if measured else math.nan
        agreement.verify(step, self._identity.branch, cached, group, diff=diff)

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
        agreement.all_succeeded(self._identity.step, failure, self.groups.pair)

    @property
    def _joint(self) -> bool:
        """Whether one decision covers the CFG ranks because their forward is one."""
        return self.groups.pair is not None and self.groups.pair is self.groups.forward

    @property
    def _coupled(self) -> bool:
        """Whether this forward's decision is one with those of the other CFG ranks.

        Every CFG rank runs at least one forward a step, but not always as many: the first ones are coupled.
        """
        if self.groups.pair is None or self._joint or self._forward_in_step > 0:
            return False
        return self.spec.settings.lockstep or not self._separate

    @torch.compiler.disable
    def action(self, cached: int = 0, continuous: int = 0) -> Action:
        """What the plan says of the forward under way; where decisions are one, the strictest branch's."""
        spec, branch = self.spec, self._identity.branch
        plans = [spec.plan_of(each) for each in ((COND, "uncond") if self._coupled else (branch,))]
        actions = {plan.action(self._identity.step - spec.first_step, cached, continuous) for plan in plans}
        return next(each for each in (Action.COMPUTE, Action.MEASURE, Action.CACHE) if each in actions)

    def _decide(self, residual: torch.Tensor, prefix: str) -> bool:
        context, identity = self._current_context, self._identity
        if not context.has_reference:
            return False
        action = self.action(context.cached_count, context.streak)
        may_cache = identity.branch not in self._poisoned and context.residual_shape == residual.shape
        if action is not Action.MEASURE:
            return action is Action.CACHE and may_cache
        reference = self.get_Fn_buffer(prefix)
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

    def _similar(self, t1: torch.Tensor, t2: torch.Tensor, threshold: float, may_cache: bool) -> bool:
        """As ``similarity``.

        Args:
            may_cache: False where this rank computes whatever the difference. The ranks of its group may not
                know (unequal shards can change shape on one rank only), so it takes part in their decision.
        """
        if threshold <= 0.0:
            return False
        if threshold >= 1.0:
            return may_cache
        context, step = self._current_context, self._identity.step
        diff = decisive = self._shared_diff()
        if diff is None:
            if not may_cache and self._group is None:
                return False
            diff, decisive, may_cache = self._measure(t1, t2, may_cache)
        if t1.shape != t2.shape:
            return False
        if self._identity.branch == COND:
            self._leading[context.blocks] = (step, diff)
        self.branch_stats.measured(step, diff)
        context.last_diff = (step, diff)
        if math.isfinite(diff):
            context.accumulated_residual_diff += diff
        return may_cache and decisive < threshold

    @property
    def _group(self) -> Any:
        return self.groups.pair if self._coupled else self.groups.forward

    def _real(self, residual: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, dim) without the padding that makes shards equal."""
        return residual[:, : self.groups.real_tokens(residual.shape[1])] if residual.ndim == 3 else residual

    def _measure(self, t1: torch.Tensor, t2: torch.Tensor, may_cache: bool) -> tuple[float, float, bool]:
        """This branch's difference, the one that decides, and whether no rank must compute."""
        important = self.get_important_condition_threshold()
        if self._group is None:
            diff = residual_difference(t1, t2, important_threshold=important)
            return diff, diff, True
        shared = self._coupled and not self._separate
        adds = t1.shape == t2.shape and (not shared or self._identity.branch == COND)
        apart = self._coupled and self._separate
        diffs, compute = reduced_differences(
            residual_sums(self._real(t1), self._real(t2), important) if adds else None,
            self._group,
            device=t1.device,
            compute=not may_cache,
            row=self.groups.row if apart else 0,
            rows=self.groups.rows if apart else 1,
            important_threshold=important,
        )
        if shared:
            self._leading[self._current_context.blocks] = (self._identity.step, diffs[0])
        # max() may pass over NaN.
        decisive = math.nan if any(math.isnan(each) for each in diffs) else max(diffs)
        return diffs[self.groups.row if apart else 0], decisive, not compute

    @property
    def _separate(self) -> bool:
        return self.spec.settings.cfg_diff_compute_separate

    def _shared_diff(self) -> float | None:
        """The conditional branch's difference at this step and block list, where the others follow it."""
        if self._separate or self._identity.branch == COND:
            return None
        leading = self._leading.get(self._current_context.blocks)
        if leading is None or leading[0] != self._identity.step:
            return None
        return leading[1]

    @torch.compiler.disable
    def add_cached_step(self) -> None:
        """Count a cached step of the context."""
        self._current_context.cached_count += 1

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
