"""The residual difference: how far a step is from the last computed one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from . import kernels

EMPTY = 1e-30


def residual_sums(
    reference: torch.Tensor, current: torch.Tensor, important_threshold: float = 0.0
) -> torch.Tensor:
    """Sums that a decision needs, so that shards can be added up.

    Args:
        reference: residual of the last computed step, (batch, tokens, dim).
        current: residual of this step, same shape.
        important_threshold: if positive, only tokens whose own relative difference exceeds it count,
            as cache-dit's ``important_condition_threshold``; where no token does, all count.

    Returns:
        float32 tensor (4,): sum |current - reference| and sum |reference| over the tokens that count,
        then the same two over all tokens. Without a threshold both pairs are equal.
    """
    if important_threshold <= 0.0 and kernels.usable(reference, current):
        sums = kernels.difference_sums(reference, current)
        return torch.cat([sums, sums])
    difference = (current.float() - reference.float()).abs()
    magnitude = reference.float().abs()
    sums = torch.stack([difference.sum(), magnitude.sum()])
    if important_threshold <= 0.0:
        return torch.cat([sums, sums])
    token_difference, token_magnitude = difference.sum(-1), magnitude.sum(-1)
    counted = token_difference > important_threshold * token_magnitude
    important = torch.stack([(token_difference * counted).sum(), (token_magnitude * counted).sum()])
    return torch.cat([important, sums])


def difference(sums: Sequence[float], important_threshold: float = 0.0) -> float:
    """Relative L1 difference of four sums, NaN for a reference of zeros."""
    counted, counted_magnitude, total, magnitude = sums
    if counted_magnitude > EMPTY and important_threshold > 0.0:
        return counted / counted_magnitude
    if magnitude <= EMPTY:
        return float("nan")
    return total / magnitude


def residual_difference(
    reference: torch.Tensor, current: torch.Tensor, *, important_threshold: float = 0.0
) -> float:
    """Relative L1 difference ``sum |current - reference| / sum |reference|`` on one rank.

    NaN where there is NaN, or for a reference of zeros.
    """
    return difference(residual_sums(reference, current, important_threshold).tolist(), important_threshold)


def reduced_differences(
    sums: torch.Tensor | None,
    group: dist.ProcessGroup,
    *,
    device: torch.device,
    compute: bool = False,
    row: int = 0,
    rows: int = 1,
    important_threshold: float = 0.0,
) -> tuple[list[float], bool]:
    """Differences over all shards of a group, and whether one of its ranks must compute.

    One all-reduce of ``rows x 5`` float32 values over ``group`` and one read by the host. Sums of unequal
    shards add up to those of the whole, and NaN on one rank reaches all.

    Args:
        sums: this rank's four sums, None where it has none to add.
        compute: this rank computes the step whatever the difference.
        row: what this rank adds to; each row is a difference of its own.

    Returns:
        one difference a row, NaN for a row that no rank added to; True where any rank must compute.
    """
    packed = torch.zeros(rows, 5, dtype=torch.float32, device=device)
    if sums is not None:
        packed[row, :4] = sums
    if compute:
        packed[row, 4] = 1.0
    dist.all_reduce(packed, group=group)
    read = packed.tolist()
    return [difference(each[:4], important_threshold) for each in read], any(each[4] > 0.0 for each in read)
