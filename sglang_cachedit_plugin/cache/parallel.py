"""How a transformer is spread over ranks: what cache-dit is told, and what cache-dit or diffusers say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Stands where cache-dit looks for the parallelism config of a transformer that SGLang has spread itself.

    cache-dit's own ``ParallelismConfig`` would be wrong here: with TP and SP together it builds a device mesh
    over the first ranks of the world as soon as it is made, and it is meant to be handed to ``enable_cache``,
    which would spread the transformer again.
    """

    ulysses_size: int = 1
    ring_size: int = 1
    tp_size: int = 1

    @property
    def world_size(self) -> int:
        return self.ulysses_size * self.ring_size * self.tp_size

    def strify(self, *args: Any, **kwargs: Any) -> str:
        """The form in which cache-dit's summary shows a layout."""
        sizes = (("Ulysses", self.ulysses_size), ("Ring", self.ring_size), ("TP", self.tp_size))
        return "_".join(f"{name}{size}" for name, size in sizes if size > 1)


def tell_parallel(transformer: nn.Module, layout: ParallelLayout) -> None:
    """Let cache-dit see that ``transformer`` runs in parallel: its summary and its patches of models ask.

    A transformer that cache-dit has spread itself keeps what it says.
    """
    if layout.world_size > 1 and not getattr(transformer, "_is_parallelized", False):
        vars(transformer).update(_is_parallelized=True, _parallelism_config=layout)


def weight_ranks(modules: Iterable[nn.Module]) -> set[int]:
    """Ranks from which FSDP gathers the weights of each block of ``modules``, this one among them; empty without."""
    ranks: set[int] = set()
    for module in modules:
        spread = module.parameters() if isinstance(module, FSDPModule) else ()
        parameter = next((each for each in spread if isinstance(each, DTensor)), None)
        if parameter is None:
            continue
        for dimension, placement in enumerate(parameter.placements):
            if placement.is_shard():
                ranks.update(dist.get_process_group_ranks(parameter.device_mesh.get_group(dimension)))
    return ranks


def mesh_group(transformer: nn.Module) -> Any:
    """Process group of the device mesh over which cache-dit or diffusers spread ``transformer``, None for one rank.

    cache-dit keeps the mesh of all three axes (ring, Ulysses, TP) in its parallelism config, that of context
    parallelism in the transformer's, and that of tensor parallelism in the sharded parameters alone.
    """
    meshes = [getattr(getattr(transformer, "_parallelism_config", None), "_flat_mesh", None)]
    context = getattr(getattr(transformer, "_parallel_config", None), "context_parallel_config", None)
    meshes.append(getattr(context, "_flattened_mesh", None))
    meshes += [getattr(parameter, "device_mesh", None) for parameter in transformer.parameters()]
    mesh = next((mesh for mesh in meshes if mesh is not None), None)
    if mesh is None or mesh.size() == 1 or mesh.get_coordinate() is None:
        return None
    return mesh.get_group()


def first_residual(block: nn.Module | None, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """What the first blocks added to this rank's part.

    Some plans of cache-dit's context parallelism (Wan, Qwen-Image) split at the input of the first block instead of the
    transformer's: the first block is given the whole sequence and returns this rank's part.

    Args:
        block: the first block.
        before: (batch, tokens, dim) of the whole sequence or of the part.
        after: (batch, tokens of the part, dim).
    """
    if before.shape != after.shape:
        parts = (hook._prepare_cp_input(before, plan) for hook, plan in _splits(block))
        part = next((part for part in parts if part.shape == after.shape), None)
        if part is None:
            # Nobody says how it was split: the states themselves are compared, as cache-dit does.
            return after
        before = part
    return after - before.to(after.device)


def _splits(block: nn.Module | None) -> Iterator[tuple[Any, Any]]:
    registry = getattr(block, "_cache_dit_hook", None)
    for hook in registry.hooks.values() if registry is not None else ():
        metadata = getattr(hook, "metadata", None)
        for plan in metadata.values() if isinstance(metadata, dict) else ():
            if hasattr(plan, "split_dim") and not getattr(plan, "split_output", False):
                yield hook, plan


def is_respread(block: nn.Module) -> bool:
    """Whether hooks of cache-dit or diffusers stand around a block: what it returns may have other tokens."""
    return hasattr(block, "_cache_dit_hook") or hasattr(block, "_diffusers_hook")
