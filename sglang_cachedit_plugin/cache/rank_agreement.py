"""Ranks that share a forward take the same decision, or stop with a message instead of hanging."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from ..errors import CacheDitError

_TEXT_BYTES = 240
"""A message travels in a tensor of this size, so that one exchange carries it."""


class RanksDisagreeError(CacheDitError):
    """Ranks of one group took different decisions, or one of them failed.

    Args:
        known_to: the process group whose ranks all raise it.
    """

    def __init__(self, message: str, known_to: dist.ProcessGroup):
        super().__init__(message)
        self.known_to = known_to


def _device(group: dist.ProcessGroup) -> torch.device:
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _gathered(own: torch.Tensor, group: dist.ProcessGroup) -> list[list[Any]]:
    own = own.to(_device(group))
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    return torch.stack(everyone).tolist()


def _gathered_texts(text: str, group: dist.ProcessGroup) -> dict[int, str]:
    data = text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
    rows = _gathered(torch.tensor(list(data), dtype=torch.uint8), group)
    ranks = dist.get_process_group_ranks(group)
    return {rank: bytes(row).rstrip(b"\0").decode(errors="replace") for rank, row in zip(ranks, rows, strict=True)}


def verify(step: int, branch: str, cached: bool, group: dist.ProcessGroup, *, diff: float = math.nan) -> None:
    """Compare step and decision over ``group``.

    Args:
        diff: the residual difference behind the decision, NaN where none was measured.

    Raises:
        RanksDisagreeError: naming every rank with its step, decision and difference.
    """
    rows = _gathered(torch.tensor([dist.get_rank(), step, cached, diff], dtype=torch.float64), group)
    if len({tuple(row[1:3]) for row in rows}) > 1:
        words = ", ".join(
            f"rank {rank:.0f}: step {at:.0f} {'cached' if hit else 'computed'} "
            + ("unmeasured" if math.isnan(value) else f"at difference {value:.6f}")
            for rank, at, hit, value in rows
        )
        raise RanksDisagreeError(f"ranks disagree in branch {branch}: {words}", group)


def verify_same(what: str, value: str, group: dist.ProcessGroup) -> None:
    """Compare a short description over ``group``.

    Raises:
        RanksDisagreeError: naming every rank with its value.
    """
    values = _gathered_texts(value, group)
    if len(set(values.values())) > 1:
        words = "; ".join(f"rank {rank}: {each}" for rank, each in values.items())
        raise RanksDisagreeError(f"ranks disagree in {what}: {words}", group)


def any_rank(flag: bool, group: dist.ProcessGroup) -> bool:
    """Whether ``flag`` holds on a rank of ``group``: one all-reduce of one float32, and one read by the host."""
    flags = torch.full((1,), float(flag), device=_device(group))
    dist.all_reduce(flags, group=group)
    return flags.item() > 0.0


def _told(own: str, group: dist.ProcessGroup) -> str:
    told = _gathered_texts(own, group)
    return "; ".join(f"rank {rank}: {text}" for rank, text in told.items() if text)


def problems(own: str, group: dist.ProcessGroup) -> str:
    """What is wrong on the ranks of ``group``: ``own``, or what the others say; empty where nothing is."""
    told = _told(own, group)
    return own or told


def all_succeeded(step: int, failure: BaseException | None, group: dist.ProcessGroup) -> None:
    """Tell the other ranks of ``group`` whether this one's forward failed.

    Raises:
        RanksDisagreeError: on a rank that did not fail, where another did; it names that rank and its error.
    """
    failed = _told("" if failure is None else f"{type(failure).__name__}: {failure}", group)
    if failed and failure is None:
        raise RanksDisagreeError(f"step {step} failed on {failed}", group)
