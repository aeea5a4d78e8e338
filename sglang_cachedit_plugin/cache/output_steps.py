"""Steps whose whole output is forecast: nothing of the transformer runs on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .compiling import no_compile
from .contexts import BranchContexts
from .output_forecast import OutputHistory
from .runtime import Identity, TransformerSpec
from .step_plan import Action

Forward = Callable[[], Any]
"""A forward of the transformer, with the arguments of the step under way."""


class _SkipForward(BaseException):
    """Leaves a transformer's forward once its first blocks have decided that the step is cached."""


class OutputSteps:
    """The outputs of one transformer by CFG branch, during one request.

    Args:
        contexts: they decide.
    """

    def __init__(self, contexts: BranchContexts):
        self._contexts = contexts
        self._histories: dict[str, OutputHistory] = {}

    def clear(self) -> None:
        """Drop all outputs."""
        self._histories.clear()

    def start_over(self, branch: str) -> None:
        """Drop the outputs of a branch."""
        if branch in self._histories:
            self._histories[branch].start_over()

    def held_bytes(self) -> int:
        """Bytes of the outputs kept."""
        return sum(history.held_bytes() for history in self._histories.values())

    def begin_request(self, spec: TransformerSpec) -> None:
        """Drop all outputs; under ``spec`` a measured decision to cache ends the forward at once."""
        self.clear()
        self._contexts.on_decision = self._skip if spec.settings.forecast == "output" else None

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
        spec, contexts = self._contexts.spec, self._contexts
        history = self._history(identity, spec)
        position = spec.position(identity.step)
        if identity.step == history.last_step:
            contexts.disable_branch(identity.branch)
        history.last_step = identity.step
        try:
            if not spec.plan.static:
                output = measured()
            else:
                contexts.begin_forward(identity)
                if self._cached_by_plan(identity, history):
                    # Fitted weights belong to the schedule's own computed steps.
                    weights = spec.weights_of(identity.branch, identity.step) if history.as_planned else None
                    return history.predict(position, weights)
                output = original()
                contexts.record(cached=False)
        except _SkipForward:
            contexts.end_forward()
            return history.predict(position, spec.weights_of(identity.branch, identity.step))
        self._computed(identity, history, position, output)
        return output

    @torch.compiler.disable
    def _history(self, identity: Identity, spec: TransformerSpec) -> OutputHistory:
        history = self._histories.get(identity.branch)
        if history is None or identity.step < history.last_step:
            settings, depth = spec.settings, max(map(len, spec.weights.values()), default=0)
            history = OutputHistory(settings.forecast_order, settings.forecast_damping, depth)
            self._histories[identity.branch] = history
        return history

    @no_compile
    def _computed(self, identity: Identity, history: OutputHistory, position: float, output: Any) -> None:
        history.update(position, output)
        if not history.ready:
            self._contexts.disable_branch(identity.branch, "its output holds no tensor that could be forecast")

    @torch.compiler.disable
    def _cached_by_plan(self, identity: Identity, history: OutputHistory) -> bool:
        if self._contexts.action() is not Action.CACHE:
            return False
        if not self._contexts.agreed(history.ready and not self._contexts.is_poisoned(identity.branch)):
            history.as_planned = False
            return False
        self._contexts.record(cached=True)
        return True
