"""How far a step is from the last computed one, and how far a forecast was off.

On CUDA one kernel makes the sums of a decision in one pass over both residuals: the eager form reads and writes each
residual several times and makes float32 copies of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

try:
    import triton
    import triton.language as tl
except ImportError:
    # Without Triton (CPU wheels of torch, some platforms) the eager form serves.
    triton = None

EMPTY = 1e-30
_BLOCK = 4096
_PROGRAMS = 528
"""Four programs for each of the 132 multiprocessors of an H100 or H200; on others merely a number."""


def usable(*tensors: torch.Tensor) -> bool:
    return triton is not None and all(each.is_cuda and each.is_contiguous() for each in tensors)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _partial_sums(  # type: ignore[no-untyped-def]
        reference, current, out, size, stride, BLOCK: tl.constexpr  # noqa: N803
    ):
        program = tl.program_id(0)
        difference = tl.zeros([BLOCK], dtype=tl.float32)
        magnitude = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(program * BLOCK, size, stride):
            offsets = start + tl.arange(0, BLOCK)
            inside = offsets < size
            known = tl.load(reference + offsets, mask=inside, other=0.0).to(tl.float32)
            now = tl.load(current + offsets, mask=inside, other=0.0).to(tl.float32)
            difference += tl.abs(now - known)
            magnitude += tl.abs(known)
        tl.store(out + 2 * program, tl.sum(difference, axis=0))
        tl.store(out + 2 * program + 1, tl.sum(magnitude, axis=0))


def difference_sums(reference: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    """``residual_sums`` by the kernel: partial sums of a fixed number of programs, then one small sum."""
    size = reference.numel()
    programs = max(1, min(_PROGRAMS, triton.cdiv(size, _BLOCK)))
    out = torch.empty(programs, 2, dtype=torch.float32, device=reference.device)
    _partial_sums[(programs,)](reference, current, out, size, programs * _BLOCK, BLOCK=_BLOCK)
    return out.sum(0)


def prepare(device: torch.device, dtype: torch.dtype) -> None:
    """Compile the kernel for tensors of ``dtype`` now, and load the others of a decision, instead of in the first."""
    sample = torch.zeros(_BLOCK, device=device, dtype=dtype)
    if usable(sample):
        sums = difference_sums(sample, sample - sample)
        packed = torch.zeros(1, 3, device=device)
        packed[0, :2] = sums
        packed.tolist()


def residual_sums(reference: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    """Sums that a decision needs, so that shards can be added up.

    Args:
        reference: residual of the last computed step, (batch, tokens, dim).
        current: residual of this step, same shape.

    Returns:
        float32 tensor (2,): sum |current - reference| and sum |reference|.
    """
    if usable(reference, current):
        return difference_sums(reference, current)
    known = reference.float()
    return torch.stack([(current.float() - known).abs().sum(), known.abs().sum()])


def difference(sums: Sequence[float]) -> float:
    """Relative L1 difference of two sums; NaN where there is NaN, or for a reference of zeros."""
    total, magnitude = sums
    return math.nan if magnitude <= EMPTY else total / magnitude


def residual_difference(reference: torch.Tensor, current: torch.Tensor) -> float:
    """Relative L1 difference ``sum |current - reference| / sum |reference|`` on one rank."""
    return difference(residual_sums(reference, current).tolist())


def reduced_differences(
    sums: torch.Tensor | None, group: Any, *, device: torch.device, compute: bool = False, rank: int = 0, ranks: int = 1
) -> tuple[list[float], bool]:
    """Differences over all shards of a group, and whether one of its ranks must compute.

    One all-reduce of ``ranks x 3`` float32 values over ``group`` and one read by the host. Sums of unequal
    shards add up to those of the whole, and NaN on one rank reaches all.

    Args:
        sums: this rank's two sums, None where it has none to add.
        compute: this rank computes the step whatever the difference.
        rank: the CFG rank whose difference this one adds to, of ``ranks`` that each have their own.

    Returns:
        one difference for each of ``ranks``, NaN for one that no rank added to; True where any rank must compute.
    """
    packed = torch.zeros(ranks, 3, dtype=torch.float32, device=device)
    if sums is not None:
        packed[rank, :2] = sums
    if compute:
        packed[rank, 2] = 1.0
    dist.all_reduce(packed, group=group)
    read = packed.tolist()
    return [difference(each[:2]) for each in read], any(each[2] > 0.0 for each in read)


class Reading:
    """One number on its way from the device.

    The copy is put into the queue of the device at once, so that reading it waits for nothing that comes later.

    Args:
        value: tensor of one element.
    """

    def __init__(self, value: torch.Tensor):
        self._event: torch.cuda.Event | None = None
        self._value = value
        if value.is_cuda:
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> float:
        """The number; waits for the work of the device that it depends on."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._value)


def relative_error(forecast: torch.Tensor, output: torch.Tensor, group: Any) -> torch.Tensor:
    """Norm of the error over that of the output, of the worst item of the batch; a tensor of one element, float32.

    Args:
        forecast: (batch, ...).
        output: likewise.
        group: ranks that hold parts of the same output; one reduction of two numbers an item.
    """
    output, error = output.float().flatten(1), (forecast.float() - output.float()).flatten(1)
    sums = torch.stack([error.square().sum(1), output.square().sum(1)])
    if group is not None:
        dist.all_reduce(sums, group=group)
    return (sums[0] / sums[1]).sqrt().amax()
