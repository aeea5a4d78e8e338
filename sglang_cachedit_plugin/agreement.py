"""Ranks that share a forward take the same decision, or stop with a message instead of hanging."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .errors import CacheDitError


class RanksDisagreeError(CacheDitError):
    """Two ranks of one group took different decisions."""


def _device(group: dist.ProcessGroup) -> torch.device:
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def all_cache(cached: bool, group: dist.ProcessGroup) -> bool:
    """Whether every rank of ``group`` would cache; one must compute, all compute."""
    flag = torch.tensor([int(cached)], device=_device(group))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=group)
    return bool(flag.item())


def verify(step: int, branch: str, cached: bool, group: dist.ProcessGroup) -> None:
    """Compare step and decision over ``group``.

    Raises:
        RanksDisagreeError: naming every rank with its step and decision.
    """
    own = torch.tensor([dist.get_rank(), step, int(cached)], device=_device(group))
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    rows = [tuple(each.tolist()) for each in everyone]
    if len({row[1:] for row in rows}) > 1:
        words = ", ".join(
            f"rank {rank}: step {at} {'cached' if hit else 'computed'}" for rank, at, hit in rows
        )
        raise RanksDisagreeError(f"ranks disagree in branch {branch}: {words}")
