"""What a request went through, written down for the tuner: model outputs, latents, timesteps.

Only where the variable names a folder. Each request replaces the one before it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..cache.spec import Identity

VARIABLE = "SGLANG_CACHEDIT_RECORD"
FILE = "last.safetensors"


def folder() -> Path | None:
    """Where requests of this process are to be written down, None: nowhere."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else None


class Recording:
    """One request: for each computed forward the latents that went in and the output, then the final latents."""

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}

    def forward(self, name: str, identity: Identity, inputs: Any, output: Any) -> None:
        """Note a computed forward of transformer ``name``."""
        for kind, value in (("input", inputs), ("output", output)):
            first = next((leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)), None)
            if first is not None:
                self._tensors[f"{kind}/{name}/{identity.branch}/{identity.step}"] = _kept(first)

    def path(self, positions: Sequence[float] | None) -> None:
        """Note the timesteps."""
        if positions is not None and len(positions):
            places = [positions[step] for step in range(len(positions))]
            self._tensors["timesteps"] = torch.tensor(places, dtype=torch.float64)

    def latents(self, value: Any) -> None:
        """Note the latents; the last ones are the final ones."""
        if isinstance(value, torch.Tensor):
            self._tensors["latents"] = _kept(value)

    def save(self, target: Path) -> None:
        """Write everything as safetensors into folder ``target``, at once or not at all."""
        from safetensors.torch import save_file

        unfinished = target / f"{FILE}.{os.getpid()}"
        save_file(self._tensors, unfinished)
        os.replace(unfinished, target / FILE)


def _kept(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", torch.float32, copy=True).contiguous()
