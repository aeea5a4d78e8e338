"""What caching is combined with on a GPU: weights elsewhere, smaller weights, other attention, CUDA graphs.

Each row is one request uncached, one with a mask that computes every step (``exact``: bit for bit the uncached one)
and one with half of the steps cached, on a transformer of FLUX's widths with 16 of its 57 blocks.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu.models import Work, build
from sglang_cachedit_plugin.integration import cuda_graphs

STEPS = 12
HALF = {"steps_computation_mask": (1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 0, 0), "steps_computation_policy": "static"}
ALL = {"steps_computation_mask": (1,) * STEPS, "steps_computation_policy": "static"}
ATTENTION = {
    "FlashAttention 3": ("_flash_3", "flash_attn_interface"), "SageAttention": ("sage", "sageattention"),
    "FlashAttention 2": ("flash", "flash_attn"), "cuDNN attention": ("_native_cudnn", "torch"),
}
"""diffusers' name of a backend, and the module that it needs."""


@contextmanager
def nothing(work: Work) -> Iterator[dict[str, Any]]:
    """The transformer as it is."""
    yield {}


@contextmanager
def float8(work: Work) -> Iterator[dict[str, Any]]:
    """torchao: float8 weights and activations in the blocks."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

    for name in ("transformer_blocks", "single_transformer_blocks"):
        quantize_(getattr(work.module, name), Float8DynamicActivationFloat8WeightConfig())
    yield {}


@contextmanager
def int8(work: Work) -> Iterator[dict[str, Any]]:
    """torchao: int8 weights in the blocks."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for name in ("transformer_blocks", "single_transformer_blocks"):
        quantize_(getattr(work.module, name), Int8WeightOnlyConfig())
    yield {}


@contextmanager
def cpu_offload(work: Work) -> Iterator[dict[str, Any]]:
    """accelerate: weights come to the device for a forward of the transformer."""
    from accelerate import cpu_offload_with_hook

    _, hook = cpu_offload_with_hook(work.module, next(work.module.parameters()).device)
    yield {"between": hook.offload}


@contextmanager
def layerwise(work: Work) -> Iterator[dict[str, Any]]:
    """SGLang's own layerwise offload of both block lists; counts the layers that it brings."""
    from sglang.multimodal_gen.runtime.managers.memory_managers.layerwise_offload import LayerwiseOffloadManager
    from sglang.multimodal_gen.runtime.platforms import initialize_current_platform

    initialize_current_platform()
    brought: Counter[str] = Counter()
    own = LayerwiseOffloadManager.prefetch_layer

    def prefetch_layer(self: Any, layer_idx: int, non_blocking: bool = True) -> None:
        before = layer_idx in self._gpu_layers
        own(self, layer_idx, non_blocking)
        brought.update(["layers"] if not before and layer_idx in self._gpu_layers else [])

    LayerwiseOffloadManager.prefetch_layer = prefetch_layer
    try:
        managers = [
            LayerwiseOffloadManager(
                work.module, layers_attr_str=name, num_layers=len(getattr(work.module, name)), enabled=True
            )
            for name in ("transformer_blocks", "single_transformer_blocks")
        ]
        if not all(manager.enabled for manager in managers):
            raise RuntimeError("the host has no layerwise offload on this device")
        yield {"count": brought}
    finally:
        LayerwiseOffloadManager.prefetch_layer = own


@contextmanager
def with_graphs(work: Work) -> Iterator[dict[str, Any]]:
    """SGLang's runner of breakable CUDA graphs around the transformer, captured before the first request."""
    from sglang.multimodal_gen.runtime.breakable_cuda_graph.runner import DiffusionBreakableCudaGraphRunner

    class Capturing(DiffusionBreakableCudaGraphRunner):
        def _should_capture_on_call(self, key: tuple) -> bool:
            return True

    runner = Capturing(work.module, next(work.module.parameters()).device)
    work.modules = {"transformer": Runner(runner)}
    yield {"runner": runner, "knobs": {"forecast": "output", "forecast_order": 1}}
    runner.reset()


class Runner:
    """Stands for the transformer in the loop; what is called is set from outside."""

    def __init__(self, runner: Any):
        self.call = self.runner = runner

    def __call__(self, **kwargs: Any) -> Any:
        return self.call(**kwargs)


def attention(backend: str, module: str) -> Callable[[Work], Any]:
    """An attention backend of diffusers by name."""

    @contextmanager
    def setup(work: Work) -> Iterator[dict[str, Any]]:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"{module} is not installed here")
        try:
            work.module.set_attention_backend(backend)
            yield {}
        finally:
            # diffusers remembers the last one for every model.
            work.module.set_attention_backend("native")

    return setup


def works(tiny: bool) -> list[dict[str, Any]]:
    """One row for each combination, or why there is none."""
    ways: dict[str, Callable[[Work], Any]] = {
        "as it is": nothing, "float8 (torchao)": float8, "int8 weights (torchao)": int8, "CPU offload": cpu_offload,
        "layerwise offload": layerwise, "breakable CUDA graphs": with_graphs,
    }
    ways |= {name: attention(*given) for name, given in ATTENTION.items()}
    rows = []
    for name, way in ways.items():
        started = time.perf_counter()
        work = build("fluxpart", tiny)
        try:
            with way(work) as extra:
                rows.append({"what": name} | _row(work, extra))
        except Exception as error:
            rows.append({"what": name, "error": f"{type(error).__name__}: {error}"[:200]})
        print(rows[-1], f"({time.perf_counter() - started:.0f} s)", flush=True)
        del work
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def _row(work: Work, extra: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.gpu.single import Plugin

    runner = extra.get("runner")
    between, count, knobs = extra.get("between", lambda: None), extra.get("count"), extra.get("knobs", {})
    work.loop(2)
    between()
    uncached, plain = _timed(work, count)
    between()
    loop = work.modules["transformer"]
    if runner is not None:
        work.modules = {"transformer": runner.transformer}
    plugin = Plugin(work)
    if runner is not None:
        work.modules = {"transformer": loop}
        loop.call = cuda_graphs.Around(runner, plugin.model.mounted["transformer"])
    row: dict[str, Any] = {"uncached_s": uncached["seconds"]}
    for label, mask in (("all", ALL), ("half", HALF), ("half", HALF)):
        plugin.begin({**mask, **knobs, "max_warmup_steps": 0}, STEPS, around=runner is not None)
        timed, latents = _timed(work, count)
        plugin.model.prepare(None)
        between()
        if label == "all":
            row["exact"] = torch.equal(latents, plain)
            continue
        branches = plugin.stats.transformers["transformer"].branches
        cached = sum(len(each.cached) for each in branches.values())
        row |= {"plugin_s": timed["seconds"], "cached": cached,
                "of_ideal": uncached["seconds"] * (STEPS - cached) / STEPS / timed["seconds"]}
        if count is not None:
            row |= {"layers_uncached": uncached["layers"], "layers_cached": timed["layers"]}
    plugin.close()
    return row


def _timed(work: Work, count: Counter[str] | None) -> tuple[dict[str, Any], torch.Tensor]:
    if count is not None:
        count.clear()
    seconds = work.loop(STEPS)
    return {"seconds": seconds, "layers": count["layers"] if count is not None else 0}, work.result
