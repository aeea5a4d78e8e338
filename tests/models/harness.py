"""Tiny models of the host's own classes on the CPU, driven through the plugin's native session.

A case says how to build one class and what its forward takes; ``Rig`` does the rest.
"""

from __future__ import annotations

import functools
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sglang_cachedit_plugin import adapters, denoising

STEPS = 6
MASK = (1, 1, 0, 1, 0, 1)
ALL = (1,) * STEPS


@dataclass(frozen=True, kw_only=True)
class Case:
    """One class.

    Args:
        build: makes the tiny model, weights undefined.
        inputs: keyword arguments of its forward for (size 0 or 1, step); the same for equal arguments.
        dtype: of weights and floating point inputs; None: as built and given.
        fresh: makes what the model keeps over a request, e.g. a cache of the prompt's keys; inputs get it.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[..., dict[str, Any]]
    dtype: torch.dtype | None = torch.float32
    fresh: Callable[[nn.Module], dict[str, Any]] = lambda model: {}


class _Arguments(SimpleNamespace):
    """Server arguments: what nobody set is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@functools.cache
def start() -> None:
    """The host in this process: CPU platform, one rank, torch SDPA, reference kernels, nothing compiled."""
    torch.set_num_threads(1)
    torch._dynamo.config.disable = True
    from sglang.multimodal_gen.runtime.platforms import initialize_current_platform

    initialize_current_platform()
    from sglang.multimodal_gen.runtime.distributed.parallel_state import (
        maybe_init_distributed_environment_and_model_parallel,
    )

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    set_arguments()
    maybe_init_distributed_environment_and_model_parallel(tp_size=1, sp_size=1)
    from tests.tiny import cpu_ops

    cpu_ops.register()


def set_arguments() -> SimpleNamespace:
    """Server arguments as layers and stages read them."""
    from sglang.multimodal_gen.runtime.server_args import set_global_server_args

    arguments = _Arguments(
        attention_backend="torch_sdpa", kv_gather_degree=1, sp_split_auto=False, enable_breakable_cuda_graph=False,
        enable_torch_compile=False, enable_cfg_parallel=False, disable_autocast=True, comfyui_mode=False,
        model_loaded={}, model_paths={},
        pipeline_config=_Arguments(dit_precision="fp32", vae_precision="fp32"),
    )
    set_global_server_args(arguments)
    return arguments


def noise(seed: int, *shape: int) -> torch.Tensor:
    """Normal noise that depends on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drift(seed: int, step: int, *shape: int) -> torch.Tensor:
    """A latent on its way: noise that moves a little with each step."""
    return noise(seed, *shape) + 0.3 * step * noise(seed + 1, *shape)


def moment(step: int) -> torch.Tensor:
    """Timestep (1,) of a step, from 900 downward."""
    return torch.tensor([900.0 - 120.0 * step])


def widen(model: nn.Module) -> None:
    """Random weights that move the output; undefined ones would not show a fault."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                value = torch.randn(parameter.shape, generator=generator) * (0.8 / fan_in**0.5)
                parameter.copy_(value)
            elif name.endswith(("weight", "scale", "gamma")):
                parameter.fill_(1.0)
            else:
                parameter.zero_()


class Rig:
    """One tiny model and the requests it serves."""

    def __init__(self, case: Case):
        start()
        self.arguments = set_arguments()
        torch.manual_seed(0)
        self.case = case
        with torch.no_grad():
            self.model = case.build().eval().requires_grad_(False)
            widen(self.model)
        if case.dtype is not None:
            self.model.to(case.dtype)
        self.row = adapters.find_row(type(self.model))
        self.calls: list[str] = []
        self.lists = []
        for name in dict.fromkeys(each.name for each in self.row.blocks):
            blocks = list(self.model.get_submodule(name))
            joins = next(each for each in self.row.blocks if each.name == name).joins
            paths = [f"{name}.{index}" for index in range(len(blocks))]
            if joins:
                self.lists[-1] += paths
            elif paths:
                self.lists.append(paths)
            for path, block in zip(paths, blocks, strict=True):
                block.register_forward_pre_hook(lambda *_, path=path: self.calls.append(path))
        self.stage = _stage(self.model, self.arguments)
        self.state: dict[str, Any] = {}
        self.counts: list[list[str]] = []

    @torch.no_grad()
    def step(self, batch: Any, size: int, step: int, at: int | None = None) -> Any:
        """One forward at ``step``; with ``at`` on the inputs of that step."""
        from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context

        self.calls.clear()
        inputs = self.case.inputs(size, step if at is None else at, **self.state)
        if self.case.dtype is not None:
            inputs = {name: _cast(value, self.case.dtype) for name, value in inputs.items()}
        with set_forward_context(current_timestep=step, attn_metadata=None, forward_batch=batch):
            output = self.model(**inputs)
        self.counts.append(list(self.calls))
        return output

    def request(self, size: int = 0, at: int | None = None, enable: bool = True, **knobs: Any):
        """Outputs of all steps and the report of one request."""
        batch = _batch(enable, knobs)
        self.counts = []
        self.state = self.case.fresh(self.model)
        denoising.CacheDitDenoisingMixin._maybe_enable_cache_dit(self.stage, STEPS, batch)
        try:
            outputs = [leaves(self.step(batch, size, step, at)) for step in range(STEPS)]
        finally:
            session = denoising._open.pop()[1]
            report = session.close().as_dict()
        return outputs, report

    def plain(self, size: int = 0, at: int | None = None) -> list[list[torch.Tensor]]:
        """Outputs of all steps without the plugin."""
        self.counts = []
        self.state = self.case.fresh(self.model)
        batch = _batch(False, {})
        return [leaves(self.step(batch, size, step, at)) for step in range(STEPS)]

    def kept(self, first: int, last: int) -> list[str]:
        """Blocks that run on a cached step."""
        return [path for each in self.lists for path in (*each[:first], *each[len(each) - last :])]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1:
        return value.to(dtype)
    return value


def leaves(output: Any) -> list[torch.Tensor]:
    """The tensors of an output, in order."""
    from torch.utils import _pytree as pytree

    return [leaf.clone() for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def same(left: Any, right: Any) -> bool:
    """Whether two lists of outputs are equal bit for bit."""
    pairs = [(a, b) for one, two in zip(left, right, strict=True) for a, b in zip(one, two, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


def distance(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Largest difference of two outputs, relative to the largest value."""
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-12))
        for a, b in zip(left, right, strict=True)
    )


def _batch(enable: bool, knobs: dict[str, Any]) -> SimpleNamespace:
    return _Arguments(
        sampling_params=SimpleNamespace(enable_cache_dit=enable, cache_dit_params=knobs or None),
        timesteps=torch.linspace(900, 300, STEPS), is_warmup=False, is_cfg_negative=False, extra={},
        enable_teacache=False, enable_spectrum=False, enable_sequence_shard=False,
    )


def _stage(model: nn.Module, arguments: SimpleNamespace) -> Any:
    from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage

    stage = DenoisingStage.__new__(DenoisingStage)
    stage.transformer, stage.transformer_2 = model, None
    stage.server_args = arguments
    return stage


@contextmanager
def counted(function: str, module: Any) -> Iterator[Counter]:
    """Count calls of a module's function inside."""
    calls: Counter = Counter()
    own = getattr(module, function)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls[function] += 1
        return own(*args, **kwargs)

    setattr(module, function, wrapper)
    try:
        yield calls
    finally:
        setattr(module, function, own)
