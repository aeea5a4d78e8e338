"""The CPU in place of a device with memory and streams of its own, for what the host does on such devices only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch


@contextmanager
def device_with_streams() -> Iterator[None]:
    """PyTorch has streams for the CPU in which nothing runs beside; what they lack is added."""
    with (
        mock.patch.object(torch, "get_device_module", return_value=torch.cpu),
        mock.patch.object(torch.cpu, "current_device", return_value=0),
        mock.patch.object(torch.cpu, "empty_cache", create=True),
        mock.patch.object(torch.cpu.Stream, "synchronize", create=True),
    ):
        yield
