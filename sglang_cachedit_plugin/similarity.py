"""The residual difference: how far a step is from the last computed one."""

from __future__ import annotations

import torch
import torch.distributed as dist

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
    difference = (current.float() - reference.float()).abs()
    magnitude = reference.float().abs()
    sums = torch.stack([difference.sum(), magnitude.sum()])
    if important_threshold <= 0.0:
        return torch.cat([sums, sums])
    token_difference, token_magnitude = difference.sum(-1), magnitude.sum(-1)
    counted = token_difference > important_threshold * token_magnitude
    important = torch.stack([(token_difference * counted).sum(), (token_magnitude * counted).sum()])
    return torch.cat([important, sums])


def residual_difference(
    reference: torch.Tensor,
    current: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    important_threshold: float = 0.0,
) -> float:
    """Relative L1 difference ``sum |current - reference| / sum |reference|`` over all shards.

    One all-reduce of four float32 values when ``group`` is given, and one read by the host.
    NaN anywhere, or a reference of zeros, gives NaN on every rank: sums carry NaN through the reduction.
    """
    sums = residual_sums(reference, current, important_threshold)
    if group is not None:
        dist.all_reduce(sums, group=group)
    counted, counted_magnitude, total, magnitude = sums.tolist()
    if counted_magnitude > EMPTY and important_threshold > 0.0:
        return counted / counted_magnitude
    if magnitude <= EMPTY:
        return float("nan")
    return total / magnitude
