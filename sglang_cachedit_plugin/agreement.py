"""Ranks that share a forward take the same decision, or stop with a message instead of hanging."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from .errors import CacheDitError

_TEXT_BYTES = 240


class RanksDisagreeError(CacheDitError):
    """Ranks of one group took different decisions, or one of them failed."""


def _device(group: dist.ProcessGroup) -> torch.device:
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _gathered(own: torch.Tensor, group: dist.ProcessGroup) -> list[list[float]]:
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    return torch.stack(everyone).tolist()


def verify(
    step: int, branch: str, cached: bool, group: dist.ProcessGroup, *, diff: float = math.nan
) -> None:
    """Compare step and decision over ``group``.

    Args:
        diff: the residual difference behind the decision, NaN where none was measured.

    Raises:
        RanksDisagreeError: naming every rank with its step, decision and difference.
    """
    own = torch.tensor([dist.get_rank(), step, cached, diff], dtype=torch.float64, device=_device(group))
    rows = _gathered(own, group)
    if len({tuple(row[1:3]) for row in rows}) > 1:
        words = ", ".join(
            f"rank {rank:.0f}: step {at:.0f} {'cached' if hit else 'computed'} "
            + ("unmeasured" if math.isnan(value) else f"at difference {value:.6f}")
            for rank, at, hit, value in rows
        )
        raise RanksDisagreeError(f"ranks disagree in branch {branch}: {words}")


def all_succeeded(step: int, failure: BaseException | None, group: dist.ProcessGroup) -> None:
    """Tell the other ranks of ``group`` whether this one's forward failed.

    Raises:
        RanksDisagreeError: on a rank that did not fail, where another did; it names that rank and its error.
    """
    text = "" if failure is None else f"{type(failure).__name__}: {failure}"
    own = torch.zeros(_TEXT_BYTES + 1, dtype=torch.uint8, device=_device(group))
    data = text.encode()[:_TEXT_BYTES]
    own[0] = failure is not None
    own[1 : len(data) + 1] = torch.tensor(list(data), dtype=torch.uint8)
    rows = _gathered(own, group)
    failed = [
        f"rank {dist.get_global_rank(group, index)}: {bytes(row[1:]).rstrip(bytes(1)).decode(errors='replace')}"
        for index, row in enumerate(rows)
        if row[0]
    ]
    if failed and failure is None:
        raise RanksDisagreeError(f"step {step} failed on {'; '.join(failed)}")
