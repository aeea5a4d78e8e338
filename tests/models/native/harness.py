"""Tiny models of the host's own classes on the CPU, driven through the plugin's native session.

A case says how to build one class and what its forward takes; ``Rig`` does the rest.
"""

from __future__ import annotations

import os
import socket
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from sglang_cachedit_plugin import adapters
from sglang_cachedit_plugin.integration import native
from sglang_cachedit_plugin.integration.request import WORKER
from tests.tiny import cpu_ops

STEPS = 6
MASK = [1, 1, 0, 1, 0, 1]
CACHED = [2, 4]
COMPUTED = [0, 1, 3, 5]


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


@contextmanager
def started() -> Iterator[None]:
    """The host in this process: CPU platform, one rank, torch SDPA, reference kernels, nothing compiled."""
    from sglang.multimodal_gen.runtime import server_args
    from sglang.multimodal_gen.runtime.platforms import initialize_current_platform

    initialize_current_platform()
    from sglang.multimodal_gen.runtime.distributed import parallel_state

    address = _free_address()
    before = server_args._global_server_args, torch._dynamo.config.disable
    torch._dynamo.config.disable = True
    with patch.dict(os.environ, address), pytest.MonkeyPatch.context() as patched:
        # Not patch.dict: it would also forget whatever is imported for the first time inside.
        patched.setitem(sys.modules, "sgl_kernel", _kernels())
        set_arguments()
        parallel_state.maybe_init_distributed_environment_and_model_parallel(tp_size=1, sp_size=1)
        cpu_ops.register()
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
            server_args._global_server_args, torch._dynamo.config.disable = before


def _free_address() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"
    }


def _kernels() -> types.ModuleType:
    """Reference version of the kernel that FLUX.3 takes from a package which does not load on a CPU."""

    def silu_and_mul(x: torch.Tensor, out: torch.Tensor) -> None:
        gate, value = x.chunk(2, -1)
        out.copy_(torch.nn.functional.silu(gate) * value)

    module = types.ModuleType("sgl_kernel")
    module.silu_and_mul = silu_and_mul
    return module


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
        self.arguments = set_arguments()
        torch.manual_seed(0)
        self.case = case
        with torch.no_grad():
            self.model = case.build().eval().requires_grad_(False)
            widen(self.model)
        if case.dtype is not None:
            self.model.to(case.dtype)
        self.row = adapters.find_adapter(type(self.model))
        self.calls: list[str] = []
        self.lists = []
        for name in dict.fromkeys(each.name for each in self.row.blocks):
            blocks = list(self.model.get_submodule(name))
            shares_decision = next(each for each in self.row.blocks if each.name == name).shares_decision
            paths = [f"{name}.{index}" for index in range(len(blocks))]
            if shares_decision:
                self.lists[-1] += paths
            elif paths:
                self.lists.append(paths)
            for path, block in zip(paths, blocks, strict=True):
                block.register_forward_pre_hook(lambda *_, path=path: self.calls.append(path))
        self.stage = stage_of(self.model, self.arguments)
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
        request = batch(enable, knobs)
        self.counts = []
        self.state = self.case.fresh(self.model)
        native.CacheDitDenoisingMixin._maybe_enable_cache_dit(self.stage, STEPS, request)
        try:
            outputs = [leaves(self.step(request, size, step, at)) for step in range(STEPS)]
        finally:
            session = WORKER.active.sessions.pop()
            report = session.close().as_dict()
        return outputs, report

    def plain(self, size: int = 0, at: int | None = None) -> list[list[torch.Tensor]]:
        """Outputs of all steps without the plugin."""
        self.counts = []
        self.state = self.case.fresh(self.model)
        request = batch(False, {})
        return [leaves(self.step(request, size, step, at)) for step in range(STEPS)]

    def kept(self, full: list[str], first: int, last: int) -> list[str]:
        """Of the blocks that ran on a computed step those that run on a cached one too."""
        kept = {path for each in self.lists for path in (*each[:first], *each[len(each) - last :])}
        return [path for path in full if path in kept]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1:
        return value.to(dtype)
    return value


def leaves(output: Any) -> list[torch.Tensor]:
    """The tensors of an output, in order."""
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


def batch(enable: bool, knobs: dict[str, Any]) -> SimpleNamespace:
    """A request as stages and models read it."""
    return _Arguments(
        sampling_params=SimpleNamespace(enable_cache_dit=enable, cache_dit_params=knobs or None),
        timesteps=torch.linspace(900, 300, STEPS), is_warmup=False, is_cfg_negative=False, extra={},
        enable_teacache=False, enable_spectrum=False, enable_sequence_shard=False,
    )


def stage_of(model: nn.Module, arguments: SimpleNamespace) -> Any:
    """The host's denoising stage, as far as caching needs it."""
    from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage

    stage = DenoisingStage.__new__(DenoisingStage)
    stage.transformer, stage.transformer_2 = model, None
    stage.server_args = arguments
    return stage
