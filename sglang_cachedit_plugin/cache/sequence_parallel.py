"""Cached blocks of a transformer whose first block splits the sequence over ranks.

Some plans of cache-dit's context parallelism (Wan, Qwen-Image) split at the input of the first block instead of
the transformer's: what the cached blocks are given is the whole sequence, what the first block returns is this
rank's part. cache-dit 1.5.1 then subtracts one from the other and fails; 1.5.3 splits as is done here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def first_residual(block: nn.Module, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """What the first blocks added to this rank's part.

    Args:
        block: the first block.
        before: (batch, tokens, dim) of the whole sequence or of the part.
        after: (batch, tokens of the part, dim).
    """
    if before.shape != after.shape:
        parts = (hook._prepare_cp_input(before, plan) for hook, plan in _splits(block))
        before = next((part for part in parts if part.shape == after.shape), None)
        if before is None:
            # Nobody says how it was split: the states themselves are compared, as cache-dit does.
            return after
    return after - before.to(after.device)


def _splits(block: nn.Module) -> Iterator[tuple[Any, Any]]:
    registry = getattr(block, "_cache_dit_hook", None)
    for hook in registry.hooks.values() if registry is not None else ():
        metadata = getattr(hook, "metadata", None)
        for plan in metadata.values() if isinstance(metadata, dict) else ():
            if hasattr(plan, "split_dim") and not getattr(plan, "split_output", False):
                yield hook, plan


def is_respread(block: nn.Module) -> bool:
    """Whether hooks of cache-dit or diffusers stand around a block: what it returns may have other tokens."""
    return hasattr(block, "_cache_dit_hook") or hasattr(block, "_diffusers_hook")


def measure_parts(cached_blocks: nn.Module, first_block: nn.Module) -> None:
    """Let cache-dit's ``cached_blocks`` take their first residual from ``first_residual``."""
    cached_blocks._get_Fn_residual = functools.partial(first_residual, first_block)


def hooked_forward(module: nn.Module) -> Any | None:
    """Where cache-dit's hooks keep the forward that they stand around, None where there are none."""
    return next(iter(getattr(getattr(module, "_cache_dit_hook", None), "_fn_refs", ())), None)
