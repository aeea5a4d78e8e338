"""Forecast of the whole model output: on a cached step nothing of the transformer runs.

The output of every tensor leaf is extrapolated through the last computed outputs on the real spacing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .forecast import Extrapolator


class OutputHistory:
    """Computed outputs of one branch, and how its steps went.

    Args:
        order: degree of the extrapolation.
        damping: what its terms count, see ``forecast.damped_weights``.
        depth: outputs remembered for fitted weights, if more than the extrapolation's.
    """

    def __init__(self, order: int, damping: float = 1.0, depth: int = 0):
        self._new = functools.partial(Extrapolator, order, damping, depth)
        self.last_step = -1
        self.as_planned = True
        """Whether every output was computed because the schedule says so."""
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

    @torch.compiler.disable
    def update(self, position: float, output: Any) -> None:
        """Add a computed output: a tensor, or a tuple, list, mapping or model output of tensors."""
        leaves, structure = pytree.tree_flatten(output)
        if structure != self._structure:
            self._structure = structure
            self._leaves = [self._new() for _ in leaves]
        self._constants = leaves
        for known, leaf in zip(self._leaves, leaves, strict=True):
            if isinstance(leaf, torch.Tensor):
                # The host may change what it gets in place.
                known.update(position, leaf.detach().clone())

    @torch.compiler.disable
    def predict(self, position: float, weights: Sequence[float] | None = None) -> Any:
        """The forecast, in the structure of the last output; ``weights`` of the last outputs, oldest first."""
        leaves = [
            known.predict(position, weights).clone() if len(known) else constant
            for known, constant in zip(self._leaves, self._constants, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self._structure)

    def held_bytes(self) -> int:
        """Bytes of the outputs kept."""
        return sum(leaf.held_bytes() for leaf in self._leaves)
