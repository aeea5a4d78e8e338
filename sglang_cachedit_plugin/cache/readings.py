"""Numbers that a device has yet to compute, read by the host when they are needed."""

from __future__ import annotations

import torch
import torch.distributed as dist


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
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> float:
        """The number; waits for the work of the device that it depends on."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._value)


def relative_error(forecast: torch.Tensor, output: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
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
