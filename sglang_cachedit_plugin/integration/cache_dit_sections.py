"""Parallelism, quantisation and attention of a diffusers pipeline, carried out by cache-dit."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import cache_dit
import torch
from cache_dit.platforms import current_platform
from torch import nn

from ..errors import CacheDitError

_REGISTERS = {
    "sequence": ("ContextParallelismPlannerRegister", "_ensure_cp_planners_activated"),
    "tensor": ("TensorParallelismPlannerRegister", "_ensure_tp_planners_activated"),
}


def splits(way: str) -> list[str]:
    """Beginnings of the names of the transformer classes that cache-dit can split.

    Args:
        way: ``sequence`` (Ulysses, ring), ``tensor`` or ``async`` (overlapped Ulysses).
    """
    if way == "async":
        registry = importlib.import_module("cache_dit.distributed.async_ulysses").AsyncUlyssesRegistry
        registry._ensure_activated()
        return list(registry._planner_registry)
    dispatch = importlib.import_module("cache_dit.distributed.transformers.dispatch")
    register, activate = _REGISTERS[way]
    getattr(dispatch, activate)()
    return getattr(dispatch, register).supported_planners()[1]


def apply(pipe: Any, sections: Mapping[str, Any]) -> None:
    """Split, quantise and set the attention of ``pipe`` as checked ``sections`` say.

    The cache is mounted before: cache-dit's patches of single models refuse a transformer that is split already.

    Raises:
        CacheDitError: cache-dit cannot do it with this model; the message is its own.
    """
    with ExitStack() as stack:
        stack.enter_context(_beneath_offload(pipe))
        if "quantize_config" in sections:
            stack.enter_context(_quantisable())
        if not torch.accelerator.is_available():
            # A CUDA build of PyTorch names CUDA its accelerator even so, and cache-dit makes its meshes there.
            cpu = torch.device("cpu")
            stack.enter_context(_replaced(torch.accelerator, "current_accelerator", lambda *_, **__: cpu))
        try:
            cache_dit.enable_cache(pipe, **cache_dit.load_configs(dict(sections)))
        except Exception as error:
            # Whatever cache-dit, diffusers or torchao raise: the model does not fit the sections.
            names = ", ".join(sections)
            raise CacheDitError(f"{type(pipe).__name__} cannot take {names} of the config file: {error}") from error


@contextmanager
def _beneath_offload(pipe: Any) -> Iterator[None]:
    """Hooks that are put on now stand under accelerate's, which is taken off after each request."""
    offloaded = [
        (module, module.forward)
        for module in getattr(pipe, "components", {}).values()
        if isinstance(module, nn.Module) and hasattr(module, "_old_forward")
    ]
    for module, _ in offloaded:
        module.forward = module._old_forward
    try:
        yield
    finally:
        for module, forward in offloaded:
            module._old_forward, module.forward = module.forward, forward


@contextmanager
def _quantisable() -> Iterator[None]:
    """cache-dit's quantisation on any device that torchao can serve; ``fit`` has refused what it cannot.

    cache-dit 1.5.1 asks for float8 hardware when its module is imported, and all versions ask for CUDA whatever the
    number format, though int8 weights work on the CPU.
    """
    with _replaced(current_platform, "get_device_capability", lambda *_: (99, 0)):
        module = importlib.import_module("cache_dit.quantization.torchao.quantize_ao")
    if torch.accelerator.is_available():
        yield
        return
    with _replaced(
        module, "_check_if_module_can_quantized", lambda each: not getattr(each, "_is_quantized", False)
    ):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)
