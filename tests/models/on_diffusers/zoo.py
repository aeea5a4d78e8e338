"""Tiny transformers of diffusers with random widened weights, and inputs that drift from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn

STEPS = 6


class Noise:
    """Inputs of one step: the same start and direction at every step, the way along it grows with the step."""

    def __init__(self, step: int, seed: int = 7):
        self.step = step
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        start, drift = (torch.randn(*shape, generator=self._generator) for _ in range(2))
        return start + 0.1 * self.step * drift

    def fixed(self, *shape: int) -> torch.Tensor:
        """A tensor that does not change with the step."""
        return torch.randn(*shape, generator=self._generator)

    @property
    def time(self) -> torch.Tensor:
        """Timestep, from 900 downwards. Shape (1,)."""
        return torch.tensor([900.0 - 100.0 * self.step])


@dataclass(frozen=True, kw_only=True)
class Case:
    """One transformer class, built tiny.

    Args:
        config: constructor arguments.
        inputs: (noise, side of the picture in latent pixels) -> keyword arguments of the forward.
        lists: its block lists, in the order in which they run.
        extra: other inputs that change what happens between the blocks, by name.
    """

    config: dict[str, Any]
    inputs: Callable[[Noise, int], dict[str, Any]]
    lists: tuple[str, ...] = ("transformer_blocks",)
    extra: dict[str, Callable[[Noise, int], dict[str, Any]]] = field(default_factory=dict)

    def build(self, name: str) -> nn.Module:
        """The class with weights wide enough that every block moves the output."""
        torch.manual_seed(3)
        model = getattr(diffusers, name)(**self.config).eval()
        widen(model)
        return model


def widen(model: nn.Module) -> None:
    """Random matrices of gain 1; tables and gates that start at zero get values, too."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=min(1.0, 1.0 / math.sqrt(parameter[0].numel())))
        elif not parameter.any() and "norm" not in name:
            nn.init.normal_(parameter, std=0.1)


def grid_ids(side: int, axes: int = 3) -> torch.Tensor:
    """Position of each token of a picture. Shape (side * side, axes)."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.zeros(side * side, axes)
    ids[:, 1], ids[:, 2] = rows.flatten(), columns.flatten()
    return ids
