"""The residual difference: how far a step is from the last computed one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from . import kernels

EMPTY = 1e-30


def residual_sums(reference: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    """Sums that a decision needs, so that shards can be added up.

    Args:
        reference: residual of the last computed step, (batch, tokens, dim).
        current: residual of this step, same shape.

    Returns:
        float32 tensor (2,): sum |current - reference| and sum |reference|.
    """
    if kernels.usable(reference, current):
        return kernels.difference_sums(reference, current)
    known = reference.float()
    return torch.stack([(current.float() - known).abs().sum(), known.abs().sum()])


def difference(sums: Sequence[float]) -> float:
    """Relative L1 difference of two sums, NaN for a reference of zeros."""
    total, magnitude = sums
    return float("nan") if magnitude <= EMPTY else total / magnitude


def residual_difference(reference: torch.Tensor, current: torch.Tensor) -> float:
    """Relative L1 difference ``sum |current - reference| / sum |reference|`` on one rank.

    NaN where there is NaN, or for a reference of zeros.
    """
    return difference(residual_sums(reference, current).tolist())


def reduced_differences(
    sums: torch.Tensor | None,
    group: dist.ProcessGroup,
    *,
    device: torch.device,
    compute: bool = False,
    row: int = 0,
    rows: int = 1,
) -> tuple[list[float], bool]:
    """Differences over all shards of a group, and whether one of its ranks must compute.

    One all-reduce of ``rows x 3`` float32 values over ``group`` and one read by the host. Sums of unequal
    shards add up to those of the whole, and NaN on one rank reaches all.

    Args:
        sums: this rank's two sums, None where it has none to add.
        compute: this rank computes the step whatever the difference.
        row: what this rank adds to; each row is a difference of its own.

    Returns:
        one difference a row, NaN for a row that no rank added to; True where any rank must compute.
    """
    packed = torch.zeros(rows, 3, dtype=torch.float32, device=device)
    if sums is not None:
        packed[row, :2] = sums
    if compute:
        packed[row, 2] = 1.0
    dist.all_reduce(packed, group=group)
    read = packed.tolist()
    return [difference(each[:2]) for each in read], any(each[2] > 0.0 for each in read)
