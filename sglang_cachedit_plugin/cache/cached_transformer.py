"""One transformer whose forward caches while a request wants it to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import adapters
from ..errors import MountError
from ..report.stats import TransformerStats
from . import swaps
from .compiling import no_compile, with_own_code
from .contexts import BranchContexts
from .inputs import given
from .mount_check import MountProbe
from .output_steps import OutputSteps
from .patched_forwards import set_forwards, undone
from .runtime import Groups, Identity, TransformerSpec
from .swaps import Swaps
from .warmup import Rehearsal, Request

Identify = Callable[[str, Mapping[str, Any]], Identity | None]
"""(transformer name, keyword arguments of the forward) -> identity, None where the host names none."""

OnForward = Callable[[str, Identity, Any, Any], None]
"""Told of each computed forward: transformer name, identity, latents that went in, output."""


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
        with undone(transformer, pipe) as patches:
            # cache-dit's functors rewrite forwards of some models for good; here they hold for cached
            # forwards only, so that the original stays the original.
            self._swaps = self._find_swaps(pipe)
        self._patched = with_own_code(patches.pop(transformer, self._original))
        self._block_forwards = {module: patches[module] for module in transformer.modules() if module in patches}
        self._identify: Identify | None = None
        self._identity_outside: tuple[Identity | None] | None = None
        self._outputs = OutputSteps(self.contexts)
        self.on_forward: OnForward | None = None
        self.rehearsal: Rehearsal | None = None
        self.probe = MountProbe(self._swaps.watched)
        setattr(transformer, self._slot, self._wrapper())

    def _find_swaps(self, pipe: Any) -> Swaps:
        """The replacements for the block lists; none where only the whole output can be forecast."""
        row = adapters.find_adapter(type(self.module))
        self._no_blocks = row.output_only if row is not None else ""
        self._mirrored = row is not None and any(each.mirrored for each in row.blocks)
        return Swaps() if self._no_blocks else swaps.build(self.module, self.contexts, pipe)

    def _wrapper(self) -> Callable[..., Any]:
        @no_compile
        @functools.wraps(self._original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            identity = self._identity(args, kwargs)
            if identity is None:
                return self._original(*args, **kwargs)
            if self.rehearsal is not None:
                self.rehearsal.run(self, identity, args, kwargs)
            return self.run(identity, args, kwargs)

        return forward

    @no_compile
    def run(self, identity: Identity, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One forward of the request under way."""
        self._receive(identity)
        run = self._guarded if self.contexts.guarded else self._run
        output = run(identity, args, kwargs)
        if self.on_forward is not None and self.contexts.computed_last(identity):
            self.on_forward(self.name, identity, (kwargs.get("hidden_states"), args), output)
        return output

    def run_around(self, forward: Callable[..., Any], identity: Identity, args: Any, kwargs: dict[str, Any]) -> Any:
        """One forward of the request under way, where computed steps are ``forward``: what the host made of it.

        Only static schedules with ``forecast: output`` cache any step here.
        """
        self.contexts.given = given(args, kwargs)
        self._receive(identity)
        computed = functools.partial(forward, *args, **kwargs)
        if self.contexts.spec.plan.static:
            return self._outputs.forward(identity, computed, computed)
        self.contexts.begin_forward(identity)
        self.contexts.record(cached=False)
        return computed()

    @no_compile
    def run_original(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One forward without the cache."""
        return self._original(*args, **kwargs)

    def _receive(self, identity: Identity) -> None:
        """What the branch has computed so far is dropped where its inputs had another form."""
        if self.contexts.receive(identity):
            self._outputs.start_over(identity.branch)

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

    def _identity(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Identity | None:
        if self._identity_outside is not None:
            return self._identity_outside[0]
        identity = self._identify(self.name, kwargs) if self._identify is not None else None
        if identity is not None:
            self.contexts.given = given(args, kwargs)
        return identity

    def identify_outside(self) -> None:
        """Tell forwards apart by what the whole model is given, not by what hooks leave of it for this rank.

        Called once, after hooks were put around the mounted transformer.
        """
        hooked = getattr(self.module, self._slot)

        @no_compile
        @functools.wraps(hooked)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._identity_outside = (self._identity(args, kwargs),)
            try:
                return hooked(*args, **kwargs)
            finally:
                self._identity_outside = None

        setattr(self.module, self._slot, forward)

    @no_compile
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
            functools.partial(self._original, *args, **kwargs), recover=not self.contexts.told,
        )
        problem = self.contexts.problem_anywhere(self.probe.problem)
        if problem != self.probe.problem:
            self.probe.found_elsewhere(*edges, problem)
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

    @no_compile
    def _swapped_forward(self, identity: Identity, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.contexts.begin_forward(identity)
        with self._swaps.in_place():
            own_forwards = set_forwards(self._block_forwards)
            try:
                output = self._patched(*args, **kwargs)
            finally:
                set_forwards(own_forwards)
            mixed, unfinished, lost = (
                any(getattr(chain, what) for chain in self._swaps.chains) for what in ("mixed", "unfinished", "lost")
            )
        if mixed:
            self.contexts.disable_branch(identity.branch, "samples take turns in the blocks and cannot be told apart")
        elif unfinished:
            self.contexts.disable_branch(identity.branch, "the block loop left out its last block")
        if lost:
            self.contexts.record(cached=False)
            return self._original(*args, **kwargs)
        self.contexts.end_forward()
        return output

    @no_compile
    def _forecast_forward(self, identity: Identity, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward whose output is extrapolated on cached steps, and nothing else runs."""
        return self._outputs.forward(
            identity, functools.partial(self._cached_forward, identity, args, kwargs),
            functools.partial(self._original, *args, **kwargs),
        )

    def refresh(
        self, spec: TransformerSpec, stats: TransformerStats, identify: Identify, groups: Groups | None = None
    ) -> None:
        """Serve the next forwards under ``spec``.

        Raises:
            MountError: F and B do not fit the blocks, only the whole output can be forecast, or an earlier
                forward has shown that the blocks are not as declared.
        """
        self._check(spec)
        self.begin(Request(spec=spec, stats=stats, identify=identify, groups=groups or Groups()))

    @torch.compiler.disable
    def begin(self, request: Request) -> None:
        """Start over under ``request``."""
        self.on_forward, self.rehearsal = request.on_forward, None
        self.contexts.begin_request(request.spec, request.stats, request.groups)
        self._outputs.begin_request(request.spec)
        self._identify = request.identify

    @torch.compiler.disable
    def request(self) -> Request:
        """What the forwards under way are served under."""
        contexts = self.contexts
        return Request(
            spec=contexts.spec, stats=contexts.stats, identify=self._identify, groups=contexts.groups,
            on_forward=self.on_forward,
        )

    def _check(self, spec: TransformerSpec) -> None:
        settings, name = spec.settings, type(self.module).__name__
        self.probe.another_try()
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
        self._identify = self.rehearsal = None
        self._outputs.clear()
        self.contexts.clear()

    def forget(self, positions: Sequence[float] | None = None) -> None:
        """Drop what is kept of the steps so far; the request goes on, at other ``positions`` if given."""
        self._outputs.clear()
        self.contexts.clear()
        if positions is not None and self.contexts.spec is not None:
            self.contexts.spec = replace(self.contexts.spec, positions=positions)

    def buffer_bytes(self) -> int:
        """Bytes of the tensors held for cached steps."""
        return self.contexts.held_bytes() + self._outputs.held_bytes()

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
