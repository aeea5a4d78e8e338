"""One transformer whose forward caches while a request wants it to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .. import adapters
from ..errors import MountError, Reason
from ..report.stats import TransformerStats
from . import block_lists
from .branch_cache import BranchCache
from .compiling import no_compile, untraced, with_own_code
from .inputs import given
from .mount_check import MountProbe
from .output_cache import OutputCache
from .spec import Identity, RequestSpec, TransformerSpec


class CachedTransformer:
    """One transformer whose block lists have a second set of hooks.

    Its ``forward`` is replaced once. Without a request under way the original runs, on the original blocks. With one,
    the hooks stand in for the length of each forward.

    Args:
        name: ``transformer`` or ``transformer_2``.
        pipe: the diffusers pipeline, if there is one.

    Attributes:
        request: what the forwards under way are served under, None without.
    """

    def __init__(self, name: str, transformer: nn.Module, pipe: Any = None):
        self.name = name
        self.module = transformer
        # accelerate's offload hook calls _old_forward after moving the weights: stand under it.
        self._slot = "_old_forward" if hasattr(transformer, "_old_forward") else "forward"
        self._own = transformer.__dict__.get(self._slot)
        self._original = getattr(transformer, self._slot)
        self._hooked = with_own_code(self._original)
        self.cache = BranchCache()
        self._outputs = OutputCache(self.cache)
        row = adapters.find_adapter(type(transformer))
        self._output_only = "" if row is None else row.output_only
        self._lists = block_lists.BlockLists()
        if not self._output_only:
            self._lists = block_lists.build(transformer, self.cache, pipe)
        self.probe = MountProbe(self._lists.watched)
        self.request: RequestSpec | None = None
        self._identity_outside: tuple[Identity | None] | None = None
        setattr(transformer, self._slot, self._wrapper())

    def _wrapper(self) -> Callable[..., Any]:
        @no_compile
        @functools.wraps(self._original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            identity = self._identity(args, kwargs)
            if identity is None:
                return self._original(*args, **kwargs)
            if self.request is not None and self.request.warmup is not None:
                self.request.warmup(self, identity, args, kwargs)
            return self.run(identity, args, kwargs)

        return forward

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

    def _identity(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Identity | None:
        if self._identity_outside is not None:
            return self._identity_outside[0]
        if self.request is None or self.request.around:
            return None
        identity = self.request.identify(self.name, kwargs)
        if identity is not None:
            self.cache.given = given(args, kwargs)
        return identity

    # Forwards of the request under way.

    @no_compile
    def run(self, identity: Identity, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One forward of the request under way; where ranks are guarded, the other CFG ranks hear of its failure."""
        self._receive(identity)
        if self.cache.guarded:
            try:
                output = self._run(identity, args, kwargs)
            except Exception as failure:
                self.cache.tell(failure)
                raise
            self.cache.tell(None)
        else:
            output = self._run(identity, args, kwargs)
        told = None if self.request is None else self.request.on_forward
        if told is not None and self.cache.computed_last(identity):
            told(self.name, identity, (kwargs.get("hidden_states"), args), output)
        return output

    def run_around(self, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """One forward of the request under way, where computed steps are ``forward``: what the host made of it.

        Only static schedules with ``forecast: output`` cache any step here.
        """
        identity = None if self.request is None else self.request.identify(self.name, kwargs)
        if identity is None:
            return forward(*args, **kwargs)
        self.cache.given = given(args, kwargs)
        self._receive(identity)
        computed = functools.partial(forward, *args, **kwargs)
        if self.cache.request.plan.static:
            return self._outputs.forward(identity, computed, computed)
        return self._uncached(identity, computed)

    @no_compile
    def run_original(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One forward without the cache."""
        return self._original(*args, **kwargs)

    def _receive(self, identity: Identity) -> None:
        """What the branch has computed so far is dropped where its inputs had another form."""
        if self.cache.receive(identity):
            self._outputs.start_over(identity.branch)

    @no_compile
    def _uncached(self, identity: Identity, forward: Callable[[], Any]) -> Any:
        self.cache.begin_forward(identity)
        self.cache.record(cached=False)
        return forward()

    @no_compile
    def _run(self, identity: Identity, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        original = functools.partial(self._original, *args, **kwargs)
        if self.probe.problem is not None:
            return self._uncached(identity, original)
        hooked = functools.partial(self._probed_forward, identity, args, kwargs)
        if self.cache.request.settings.forecast == "output":
            return self._outputs.forward(identity, hooked, original)
        return hooked()

    @no_compile
    def _probed_forward(self, identity: Identity, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward with hooks. The first of its kind is looked at: what is wrong is wrong from then on.

        Raises:
            MountError: something is wrong with the mount, and the request is ``strict``.
        """
        settings = self.cache.request.settings
        edges = settings.Fn_compute_blocks, settings.Bn_compute_blocks
        forward = functools.partial(self._hooked_forward, identity, args, kwargs)
        if not self.probe.due(*edges):
            return forward()
        output = self.probe.run(
            *edges, forward, functools.partial(self._original, *args, **kwargs), recover=not self.cache.told
        )
        problem = self.cache.problem_anywhere(self.probe.problem)
        if problem != self.probe.problem:
            self.probe.found_elsewhere(*edges, problem)
        if self.probe.problem is not None:
            if settings.strict:
                raise MountError(f"{type(self.module).__name__}: {self.probe.problem}")
            if not self.cache.computed_last(identity):
                self.cache.record(cached=False)
        return output

    @no_compile
    def _hooked_forward(self, identity: Identity, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.cache.begin_forward(identity)
        with self._lists.in_place():
            output = self._hooked(*args, **kwargs)
            problems = [each.problem for each in self._lists.shared if each.problem is not None]
            lost = any(each.lost for each in self._lists.shared)
        if problems:
            self.cache.disable_branch(identity.branch, problems[0])
        if lost:
            self.cache.record(cached=False)
            return self._original(*args, **kwargs)
        self.cache.end_forward()
        return output

    def problem(self) -> str | None:
        """What is wrong with the mount, as far as the forwards so far have shown. Waits for the device."""
        found = self.probe.verdict()
        return None if found is None else f"{type(self.module).__name__}: {found}"

    # Requests.

    def refresh(self, request: RequestSpec) -> None:
        """Serve the next forwards under ``request``; nothing that was kept before is of use to it.

        Raises:
            MountError: F and B do not fit the blocks, only the whole output can be forecast, or an earlier
                forward has shown that the blocks are not as declared.
        """
        if (spec := request.of(self.name)) is not None:
            self._check(spec)
        self.begin(request)

    @untraced
    def begin(self, request: RequestSpec) -> None:
        """Start over under ``request``, which is known to fit."""
        spec = request.of(self.name)
        assert spec is not None
        stats = request.stats.transformers.setdefault(self.name, TransformerStats(steps=0))
        stats.steps = spec.plan.num_steps
        self.cache.begin_request(spec, stats, request.groups)
        self._outputs.begin_request(spec)
        self.request = request

    def _check(self, spec: TransformerSpec) -> None:
        settings, name = spec.settings, type(self.module).__name__
        self.probe.another_try()
        if self.probe.problem is not None:
            raise MountError(f"{name}: {self.probe.problem}")
        why = block_lists.why_not_cached(type(self.module), settings, self.num_blocks, name=self.name)
        if why is not None:
            raise MountError(why)
        if self._output_only and not spec.plan.static:
            raise MountError(Reason(
                "model", f"{name}: {self._output_only}, so no difference can be measured; use a schedule with "
                "steps_computation_policy: static"
            ))

    @property
    def num_blocks(self) -> list[int]:
        """Number of blocks over which each decision holds."""
        return self._lists.num_blocks

    def bypass(self) -> None:
        """Run the original forward; drop all buffers."""
        self.request = None
        self._outputs.clear()
        self.cache.clear()

    def buffer_bytes(self) -> int:
        """Bytes of the tensors held for cached steps."""
        return self.cache.held_bytes() + self._outputs.held_bytes()

    def describe(self) -> dict[str, Any]:
        """Class of the transformer, and its cached block lists with their lengths."""
        blocks = {each.name: len(each.hooks) for each in self._lists.patches}
        return {"class": type(self.module).__name__, "blocks": blocks}

    def unmount(self) -> None:
        """Give the transformer its own forward back."""
        self.bypass()
        if self._own is None:
            self.module.__dict__.pop(self._slot, None)
        else:
            self.module.__dict__[self._slot] = self._own
