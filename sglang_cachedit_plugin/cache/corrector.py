"""Cached steps are set right when the next output is computed.

On a cached step the model output is a prediction. The next computed output shows what those predictions should have
been: the polynomial through the computed outputs on both sides. The scheduler goes back to the first cached step,
repeats the cached steps with the values of that polynomial, and goes on from there. Predictor and corrector of a
multistep method, as in UniPC (arXiv 2302.04867), over whatever scheduler the pipeline uses, without an evaluation of
the model.
"""

from __future__ import annotations

from typing import Any

import torch

from .forecast import Extrapolator
from .solvers import Call, Place, Solver, latents_of


class Corrector:
    """The corrector of one denoising loop.

    Args:
        outputs: the computed outputs so far; whoever runs the loop adds each one before ``computed``.
        order: degree of the polynomial through the computed outputs, 1 or 2.
        carry: how far a computed output follows its corrected latents: 1 leaves the predicted clean latents as they
            were, 0 the output.
        keep: later forecasts start from the outputs so carried, not from the computed ones.

    Attributes:
        corrected: cached steps that were repeated.
        largest: largest norm of a correction, relative to that of the latents, as a tensor of one element on the
            device; None before the first.
    """

    def __init__(self, outputs: Extrapolator, order: int, carry: float, *, keep: bool):
        self._outputs, self._order, self._carry, self._keep = outputs, order, carry, keep
        self._start: tuple[dict[str, Any], torch.Tensor] | None = None
        self._pending: list[tuple[Call, Place]] = []
        self.corrected = 0
        self.largest: torch.Tensor | None = None

    def forget(self) -> None:
        """Leave the cached steps so far as they are."""
        self._start, self._pending = None, []

    def cached(self, solver: Solver, call: Call, place: Place) -> Any:
        """A step whose output is predicted; what the scheduler returns."""
        if self._start is None:
            # Some stages write the result of a step into the latents that they gave.
            self._start = (solver.snapshot(), call.sample.clone())
        self._pending.append((call.with_tensors(None, None), place))
        return solver.advance(call)

    def computed(self, solver: Solver, call: Call, place: Place) -> Any:
        """A step whose output is computed; what the scheduler returns.

        Without cached steps before it the call is handed through.
        """
        if len(self._outputs) < 2:
            # Nothing was computed before the cached steps: there is no other side to draw the polynomial from.
            self.forget()
        if self._start is not None:
            call = self._corrected(solver, call, place)
        return solver.advance(call)

    def _corrected(self, solver: Solver, call: Call, place: Place) -> Call:
        """Repeat the pending steps; the call as it would have come after them."""
        assert self._start is not None
        snapshot, sample = self._start
        solver.restore(snapshot)
        for pending, at in self._pending:
            output = self._outputs.predict(at.position, order=self._order)
            sample = latents_of(solver.advance(pending.with_tensors(output, sample)))
        self.corrected += len(self._pending)
        self.forget()
        change = sample.float() - call.sample.float()
        size = torch.linalg.vector_norm(change) / torch.linalg.vector_norm(call.sample.float())
        self.largest = size if self.largest is None else torch.maximum(self.largest, size)
        output = call.output
        if gain := self._carry * solver.gain(call, place):
            # The output of a stage that runs one sample may have no batch dimension; its latents have.
            output = torch.add(output.float(), change.reshape(output.shape), alpha=gain).to(output.dtype)
            if self._keep:
                self._outputs.update(place.position, output.detach().clone())
        return call.with_tensors(output, sample.to(call.sample.dtype))

    def held_bytes(self) -> int:
        return 0 if self._start is None else self._start[1].nbytes
