"""Steps whose whole output is forecast: nothing of the transformer runs on them.

The output of every tensor leaf is extrapolated through the last computed outputs on the real spacing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .branch_cache import BranchCache
from .compiling import no_compile, untraced
from .forecast import Extrapolator
from .spec import Identity, TransformerSpec
from .step_plan import Action

Forward = Callable[[], Any]
"""A forward of the transformer, with the arguments of the step under way."""


class _SkipForward(BaseException):
    """Leaves a transformer's forward once its first blocks have decided that the step is cached."""


class OutputHistory:
    """Computed outputs of one branch, and how its steps went.

    Args:
        order, damping, depth: see ``Extrapolator``.

    Attributes:
        as_planned: whether every output was computed because the schedule says so.
    """

    def __init__(self, order: int, damping: float = 1.0, depth: int = 0):
        self._options = order, damping, depth
        self.last_step = -1
        self.as_planned = True
        self.start_over()

    def start_over(self) -> None:
        """Forget the outputs; how the steps went stays."""
        self._leaves: list[Extrapolator] = []
        self._structure: Any = None
        self._constants: list[Any] = []

    @property
    def ready(self) -> bool:
        """Whether a tensor was computed yet; an output that hides its tensors from us never is."""
        return any(len(known) for known in self._leaves)

    @untraced
    def update(self, position: float, output: Any) -> None:
        """Add a computed output: a tensor, or a tuple, list, mapping or model output of tensors."""
        leaves, structure = pytree.tree_flatten(output)
        if structure != self._structure:
            self._structure = structure
            self._leaves = [Extrapolator(*self._options) for _ in leaves]
        self._constants = leaves
        for known, leaf in zip(self._leaves, leaves, strict=True):
            if isinstance(leaf, torch.Tensor):
                # The host may change what it gets in place.
                known.update(position, leaf.detach().clone())

    @untraced
    def predict(self, position: float, weights: Sequence[float] | None = None) -> Any:
        """The forecast, in the structure of the last output; ``weights`` of the last outputs, oldest first."""
        leaves = [
            known.predict(position, weights).clone() if len(known) else constant
            for known, constant in zip(self._leaves, self._constants, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self._structure)

    def held_bytes(self) -> int:
        return sum(leaf.held_bytes() for leaf in self._leaves)


class OutputCache:
    """The outputs of one transformer by branch, during one request; ``cache`` decides."""

    def __init__(self, cache: BranchCache):
        self._cache = cache
        self._histories: dict[str, OutputHistory] = {}

    def clear(self) -> None:
        self._histories.clear()

    def start_over(self, branch: str) -> None:
        if branch in self._histories:
            self._histories[branch].start_over()

    def held_bytes(self) -> int:
        return sum(history.held_bytes() for history in self._histories.values())

    def begin_request(self, spec: TransformerSpec) -> None:
        """Drop all outputs; under ``spec`` a measured decision to cache ends the forward at once."""
        self.clear()
        self._cache.on_decision = self._skip if spec.settings.forecast == "output" else None

    def _skip(self, cached: bool) -> None:
        if cached:
            raise _SkipForward

    @no_compile
    def forward(self, identity: Identity, measured: Forward, original: Forward) -> Any:
        """The output of a step: computed, or extrapolated from the ones before.

        Args:
            measured: the forward whose first blocks decide, where the schedule leaves that to them.
            original: the model's own.
        """
        cache, spec = self._cache, self._cache.request
        history, position = self._history(identity, spec), spec.position(identity.step)
        if identity.step == history.last_step:
            cache.disable_branch(identity.branch)
        history.last_step = identity.step
        weights = spec.weights_of(identity.branch, identity.step)
        try:
            if not spec.plan.static:
                output = measured()
            else:
                cache.begin_forward(identity)
                planned = cache.action() is Action.CACHE
                if planned and cache.cached_by_plan(history.ready):
                    cache.record(cached=True)
                    # Fitted weights belong to the schedule's own computed steps.
                    return history.predict(position, weights if history.as_planned else None)
                history.as_planned = history.as_planned and not planned
                output = original()
                cache.record(cached=False)
        except _SkipForward:
            cache.end_forward()
            return history.predict(position, weights)
        history.update(position, output)
        if not history.ready:
            cache.disable_branch(identity.branch, "its output holds no tensor that could be forecast")
        return output

    @untraced
    def _history(self, identity: Identity, spec: TransformerSpec) -> OutputHistory:
        history = self._histories.get(identity.branch)
        if history is None or identity.step < history.last_step:
            settings, depth = spec.settings, max(map(len, spec.weights.values()), default=0)
            history = OutputHistory(settings.forecast_order, settings.forecast_damping, depth)
            self._histories[identity.branch] = history
        return history
