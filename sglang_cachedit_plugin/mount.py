"""Cached blocks in place of a transformer's own, and back.

Only this file, swaps.py, contexts.py and engine.py import cache_dit. Its ``enable_cache`` is not used: it keeps
its state on classes, cannot be undone in 1.5.1, and binds contexts before branches are known. Its parts are:
the register of block lists, the cached blocks, the contexts and the calibrators.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import cache_dit
import torch
from torch import nn

from . import adapters, kernels, swaps
from .compiling import step_aside, with_own_code
from .contexts import BranchContexts, Identity
from .errors import MountError
from .guard import ForecastGuard, relative_error
from .output_forecast import OutputHistory
from .probe import MountProbe
from .runtime import Groups, RequestSpec, TransformerSpec
from .schedule import Action, StepPlan
from .sharding import hooked_forward
from .stats import RequestStats, TransformerStats
from .swaps import Swaps

Identify = Callable[[str, Mapping[str, Any]], Identity | None]
"""(transformer name, keyword arguments of the forward) -> identity, None where the host names none."""

OnForward = Callable[[str, Identity, Any, Any], None]
"""Told of each computed forward: transformer name, identity, latents that went in, output."""


def preset_mask(preset: str, num_steps: int) -> list[int]:
    """cache-dit's mask for a preset; 1 computed, 0 may be cached."""
    return cache_dit.steps_mask(mask_policy=preset, total_steps=num_steps)


_ABSENT = object()


def _set_forwards(forwards: Mapping[nn.Module, Any]) -> dict[nn.Module, Any]:
    """Set the modules' own ``forward`` attributes; returns what they were.

    Where hooks split a module over ranks, the forward beneath them is set.
    """
    previous = {}
    for module, forward in forwards.items():
        hooked = hooked_forward(module)
        own = module.__dict__ if hooked is None else vars(hooked)
        previous[module] = own.get("forward", _ABSENT)
        if forward is _ABSENT:
            own.pop("forward", None)
        else:
            own["forward"] = forward
    return previous


@contextmanager
def _undone(transformer: nn.Module, pipe: Any) -> Iterator[dict[nn.Module, Any]]:
    """Undo every forward that is replaced inside; afterwards the mapping holds the replacements."""
    roots = [transformer, *(getattr(pipe, name, None) for name in ("transformer", "transformer_2"))]
    roots = [root for root in roots if isinstance(root, nn.Module)]
    flags = [root.__dict__.get("_is_patched", _ABSENT) for root in roots]
    before = {m: m.__dict__.get("forward", _ABSENT) for root in roots for m in root.modules()}
    replacements: dict[nn.Module, Any] = {}
    try:
        yield replacements
    finally:
        after = {m: m.__dict__.get("forward", _ABSENT) for m in before}
        changed = {m: own for m, own in before.items() if after[m] is not own}
        replacements.update({m: after[m] for m in changed})
        _set_forwards(changed)
        for root, flag in zip(roots, flags, strict=True):
            if flag is _ABSENT:
                root.__dict__.pop("_is_patched", None)


class _SkipForward(BaseException):
    """Leaves a transformer's forward once its first blocks have decided that the step is cached."""


class CachedTransformer:
    """One transformer with a second set of block lists that cache.

    Its ``forward`` is replaced once. Without a request under way the original runs, on the original
    blocks. With one, the cached lists stand in for the length of each forward.

    Args:
        name: ``transformer`` or ``transformer_2``.
    """

    def __init__(self, name: str, transformer: nn.Module, pipe: Any = None):
        self.name = name
        self.module = transformer
        # accelerate's offload hook calls _old_forward after moving the weights: stand under it.
        self._slot = "_old_forward" if hasattr(transformer, "_old_forward") else "forward"
        self._own = transformer.__dict__.get(self._slot)
        self._original = getattr(transformer, self._slot)
        self.contexts = BranchContexts(name=f"{type(transformer).__name__}/{name}")
        with _undone(transformer, pipe) as patches:
            # cache-dit's functors rewrite forwards of some models for good; here they hold for cached
            # forwards only, so that the original stays the original.
            self._swaps = self._find_swaps(pipe)
        self._patched = with_own_code(patches.pop(transformer, self._original))
        self._block_forwards = {module: patches[module] for module in transformer.modules() if module in patches}
        self._identify: Identify | None = None
        self._identity_outside: tuple[Identity | None] | None = None
        self._outputs: dict[str, OutputHistory] = {}
        self.on_forward: OnForward | None = None
        self.probe = MountProbe(self._swaps.watched)
        setattr(transformer, self._slot, self._wrapper())

    def _find_swaps(self, pipe: Any) -> Swaps:
        """The replacements for the block lists; none where only the whole output can be forecast."""
        row = adapters.find_row(type(self.module))
        self._no_blocks = row.no_blocks if row is not None else ""
        self._mirrored = row is not None and any(each.mirrored for each in row.blocks)
        return Swaps() if self._no_blocks else swaps.build(self.module, self.contexts, pipe)

    def _wrapper(self) -> Callable[..., Any]:
        @step_aside
        @functools.wraps(self._original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            identity = self._identity(kwargs)
            if identity is None:
                return self._original(*args, **kwargs)
            run = self._guarded if self.contexts.guarded else self._run
            output = run(identity, args, kwargs)
            if self.on_forward is not None and self.contexts.computed_last(identity):
                self.on_forward(self.name, identity, (kwargs.get("hidden_states"), args), output)
            return output

        return forward

    def _run(self, identity: Identity, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.probe.problem is not None:
            self.contexts.begin_forward(identity)
            self.contexts.record(cached=False)
            return self._original(*args, **kwargs)
        if self.contexts.spec.settings.forecast == "output":
            return self._forecast_forward(identity, args, kwargs)
        return self._cached_forward(identity, args, kwargs)

    def _guarded(self, identity: Identity, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward whose failure the other CFG ranks hear of, instead of waiting for its result."""
        try:
            output = self._run(identity, args, kwargs)
        except Exception as failure:
            self.contexts.tell(failure)
            raise
        self.contexts.tell(None)
        return output

    def _identity(self, kwargs: Mapping[str, Any]) -> Identity | None:
        if self._identity_outside is not None:
            return self._identity_outside[0]
        return self._identify(self.name, kwargs) if self._identify is not None else None

    def identify_outside(self) -> None:
        """Tell forwards apart by what the whole model is given, not by what hooks leave of it for this rank.

        Called once, after hooks were put around the mounted transformer.
        """
        hooked = getattr(self.module, self._slot)

        @step_aside
        @functools.wraps(hooked)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._identity_outside = (self._identity(kwargs),)
            try:
                return hooked(*args, **kwargs)
            finally:
                self._identity_outside = None

        setattr(self.module, self._slot, forward)

    @step_aside
    def _cached_forward(self, identity: Identity, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward on the cached lists. The first of its kind is looked at: what is wrong is wrong from then on.

        Raises:
            MountError: something is wrong with the mount, and the request is ``strict``.
        """
        settings = self.contexts.spec.settings
        edges = settings.Fn_compute_blocks, settings.Bn_compute_blocks
        if not self.probe.due(*edges):
            return self._swapped_forward(identity, args, kwargs)
        output = self.probe.run(
            *edges, functools.partial(self._swapped_forward, identity, args, kwargs),
            functools.partial(self._original, *args, **kwargs),
        )
        if self.probe.problem is not None:
            if settings.strict:
                raise MountError(self._problem(self.probe.problem))
            if not self.contexts.computed_last(identity):
                self.contexts.record(cached=False)
        return output

    def _problem(self, text: str) -> str:
        return f"{type(self.module).__name__}: {text}"

    def problem(self) -> str | None:
        """What is wrong with the mount, as far as the forwards so far have shown. Waits for the device."""
        found = self.probe.verdict()
        return None if found is None else self._problem(found)

    @step_aside
    def _swapped_forward(self, identity: Identity, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.contexts.begin_forward(identity)
        with self._swaps.in_place():
            own_forwards = _set_forwards(self._block_forwards)
            try:
                output = self._patched(*args, **kwargs)
            finally:
                _set_forwards(own_forwards)
            unfinished, lost = (
                any(getattr(chain, what) for chain in self._swaps.chains) for what in ("unfinished", "lost")
            )
        if unfinished:
            self.contexts.poison(identity.branch, "the block loop left out its last block")
        if lost:
            self.contexts.record(cached=False)
            return self._original(*args, **kwargs)
        self.contexts.end_forward()
        return output

    @step_aside
    def _forecast_forward(self, identity: Identity, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward whose output is extrapolated on cached steps, and nothing else runs."""
        spec = self.contexts.spec
        history = self._outputs.get(identity.branch)
        if history is None or identity.step < history.last_step:
            settings, depth = spec.settings, max(map(len, spec.weights.values()), default=0)
            history = OutputHistory(settings.forecast_order, settings.forecast_damping, depth)
            self._outputs[identity.branch] = history
            if settings.max_accumulated_diff is not None and spec.spread is not None:
                history.guard = ForecastGuard(settings.max_accumulated_diff, spec.spread)
        position = spec.position(identity.step)
        if identity.step == history.last_step:
            self.contexts.poison(identity.branch)
        history.last_step = identity.step
        try:
            if not spec.plan.static:
                output = self._cached_forward(identity, args, kwargs)
            else:
                self.contexts.begin_forward(identity)
                if self._cached_by_plan(identity, history):
                    # Fitted weights belong to the schedule's own computed steps.
                    kept = history.guard is None or not history.guard.recomputed
                    return history.predict(position, spec.weights.get(identity.step) if kept else None)
                output = self._original(*args, **kwargs)
                self.contexts.record(cached=False)
        except _SkipForward:
            self.contexts.end_forward()
            return history.predict(position, spec.weights.get(identity.step))
        if history.guard is not None and history.ready:
            error = relative_error(history.predict(position), output, self.contexts.groups.forward)
            history.guard.saw(identity.step, error)
        history.update(position, output)
        if not history.ready:
            self.contexts.poison(identity.branch, "its output holds no tensor that could be forecast")
        return output

    @torch.compiler.disable
    def _cached_by_plan(self, identity: Identity, history: OutputHistory) -> bool:
        if not history.ready or self.contexts.is_poisoned(identity.branch):
            return False
        if self.contexts.action() is not Action.CACHE:
            return False
        if history.guard is not None and history.guard.recompute(identity.step):
            self.contexts.stats.remark(identity.branch, history.guard.note(identity.branch))
            return False
        self.contexts.record(cached=True)
        return True

    def _skip(self, cached: bool) -> None:
        if cached:
            raise _SkipForward

    def refresh(
        self, spec: TransformerSpec, stats: TransformerStats, identify: Identify, groups: Groups | None = None
    ) -> None:
        """Serve the next forwards under ``spec``.

        Raises:
            MountError: F and B do not fit the blocks, only the whole output can be forecast, or an earlier
                forward has shown that the blocks are not as declared.
        """
        self._check(spec)
        self._outputs.clear()
        self.on_forward = None
        self.contexts.begin_request(spec, stats, groups or Groups())
        self.contexts.on_decision = self._skip if spec.settings.forecast == "output" else None
        self._identify = identify

    def _check(self, spec: TransformerSpec) -> None:
        settings, name = spec.settings, type(self.module).__name__
        if self.probe.problem is not None:
            raise MountError(self._problem(self.probe.problem))
        if self._no_blocks:
            if settings.forecast != "output":
                raise MountError(f"{name}: {self._no_blocks}; forecast: output can be used")
            if not spec.plan.static:
                raise MountError(
                    f"{name}: {self._no_blocks}, so no difference can be measured; use a schedule with "
                    "steps_computation_policy: static"
                )
            return
        first, last = settings.Fn_compute_blocks, settings.Bn_compute_blocks
        if first + last > min(self.num_blocks):
            raise MountError(
                f"Fn_compute_blocks {first} + Bn_compute_blocks {last} exceed the "
                f"{min(self.num_blocks)} blocks of {self.name}"
            )
        if self._mirrored and last > first:
            raise MountError(
                f"{name}: its last blocks take what its first ones made: Bn_compute_blocks {last} must not exceed "
                f"Fn_compute_blocks {first}"
            )

    @property
    def num_blocks(self) -> list[int]:
        """Length of each block list that is cached."""
        return self._swaps.num_blocks

    def bypass(self) -> None:
        """Run the original forward; drop all buffers."""
        self._identify = None
        self._outputs.clear()
        self.contexts.clear()

    def forget(self) -> None:
        """Drop what is kept of the steps so far; the request goes on."""
        self._outputs.clear()
        self.contexts.clear()

    def pause(self) -> None:
        """Run the original forward; keep the buffers until the next request."""
        self._identify = None

    def buffer_bytes(self) -> int:
        """Bytes of the tensors held for cached steps."""
        return self.contexts.held_bytes() + sum(history.held_bytes() for history in self._outputs.values())

    def describe(self) -> dict[str, Any]:
        """Class of the transformer, and its cached block lists with their lengths."""
        blocks = {each.name: len(each.parent._modules[each.name]) for each in self._swaps.lists}
        return {"class": type(self.module).__name__, "blocks": blocks}

    def unmount(self) -> None:
        """Give the transformer its own forward back."""
        self.bypass()
        self._restore_slot()

    def _restore_slot(self) -> None:
        if self._own is None:
            self.module.__dict__.pop(self._slot, None)
        else:
            self.module.__dict__[self._slot] = self._own


class ModelBackend:
    """All transformers of one model, as the runtime drives them.

    Args:
        modules: transformers by name.
        identify: the host's word on which forward is under way.
        pipe: the diffusers pipeline, if there is one.

    ``groups`` are set before each request: the host may lay the same ranks out differently from one to the next.
    """

    def __init__(self, modules: Mapping[str, nn.Module], identify: Identify, *, pipe: Any = None):
        self.modules = dict(modules)
        self.identify = identify
        self._pipe = pipe
        self.groups = Groups()
        self.mounted: dict[str, CachedTransformer] = {}
        self.stats: RequestStats | None = None
        _models.add(self)

    def mount(self) -> None:
        """Prepare every transformer, or none."""
        try:
            for name, module in self.modules.items():
                self.mounted[name] = CachedTransformer(name, module, self._pipe)
                weights = next(module.parameters(), None)
                if weights is not None and weights.is_floating_point():
                    kernels.prepare(weights.device, weights.dtype)
        except BaseException:
            for transformer in self.mounted.values():
                transformer.unmount()
            self.mounted.clear()
            raise

    def identify_outside(self) -> None:
        """Hooks now stand around the transformers; see ``CachedTransformer.identify_outside``."""
        for transformer in self.mounted.values():
            transformer.identify_outside()

    def refresh(self, spec: RequestSpec) -> None:
        """Start a request on the transformers that ``spec`` names; the others run as they are."""
        assert self.stats is not None
        self.bypass()
        for each in spec.transformers:
            stats = self.stats.transformers[each.name] = _transformer_stats(each.plan)
            self.mounted[each.name].refresh(each, stats, self.identify, self.groups)

    def problem(self) -> str | None:
        """What the forwards so far have shown to be wrong with a mount, None for nothing. Waits for the device."""
        return next((found for each in self.mounted.values() if (found := each.problem()) is not None), None)

    def bypass(self) -> None:
        """Run the original forwards."""
        for transformer in self.mounted.values():
            spec = transformer.contexts.spec
            if spec is not None and spec.settings.keep_buffers:
                transformer.pause()
            else:
                transformer.bypass()

    def watch(self, on_forward: OnForward) -> None:
        """Tell ``on_forward`` of each computed forward until the request ends."""
        for transformer in self.mounted.values():
            transformer.on_forward = on_forward

    def buffer_bytes(self) -> int:
        """Bytes of all tensors held for cached steps."""
        return sum(transformer.buffer_bytes() for transformer in self.mounted.values())


    def describe(self) -> dict[str, Any]:
        """What is mounted: transformers with class and cached block lists, and bytes held between requests."""
        return {
            "backend": "native" if self._pipe is None else "diffusers",
            "transformers": {name: each.describe() for name, each in self.mounted.items()},
            "buffer_bytes": self.buffer_bytes(),
        }


_models: weakref.WeakSet[ModelBackend] = weakref.WeakSet()


def describe_models() -> list[dict[str, Any]]:
    """Every model of this process whose transformers are mounted."""
    return [model.describe() for model in list(_models) if model.mounted]


def _transformer_stats(plan: StepPlan) -> TransformerStats:
    return TransformerStats(steps=plan.num_steps)
