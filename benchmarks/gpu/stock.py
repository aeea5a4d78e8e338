"""SGLang's own Cache-DiT integration on a transformer of ``spread``, and the plugin's, ready to be driven."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.gpu.spread import Spread
from sglang_cachedit_plugin import adapters
from sglang_cachedit_plugin.cache.cached_model import CachedModel, preset_mask
from sglang_cachedit_plugin.cache.spec import Groups, Identity, RequestSpec, TransformerSpec
from sglang_cachedit_plugin.cache.step_plan import build_plan
from sglang_cachedit_plugin.config.settings import CacheSettings
from sglang_cachedit_plugin.report.stats import RequestStats

PATTERNS = {"SpreadFlux": 1, "SpreadWan": 2}

for _name, _number in PATTERNS.items():
    adapters.NATIVE[_name] = adapters.ModelAdapter(
        family="benchmark", blocks=(adapters.Blocks(name="blocks", pattern=_number),)
    )


class HostLayout:
    """The host's own groups for a layout. ``error`` says why they are not to be had; then ours stand in."""

    def __init__(self, spread: Spread, ulysses: int, ring: int, tp: int, cfg: int = 1):
        self.error: str | None = None
        self.sizes = {"ulysses": ulysses, "ring": ring, "tp": tp, "cfg": cfg}
        self.sp = spread.model if ulysses * ring > 1 else None
        self.tp = spread.tp
        self.groups = Groups(
            forward=spread.model, cfg_group=dist.group.WORLD if cfg > 1 else None, cfg_rank=spread.row, cfg_ranks=cfg
        )
        try:
            self._build(ulysses, ring, tp, cfg)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            print(f"[rank {dist.get_rank()}] host groups: {self.error}", file=sys.stderr, flush=True)
        # A communicator is made at its first use; none of the variants shall pay for it.
        for group in (self.sp, self.tp, self.groups.forward, self.groups.cfg_group):
            if group is not None:
                dist.all_reduce(torch.zeros(1, device=device()), group=group)

    def _build(self, ulysses: int, ring: int, tp: int, cfg: int) -> None:
        from sglang.multimodal_gen.runtime.distributed import parallel_state as state

        from sglang_cachedit_plugin.integration import ranks

        if state._WORLD is None:
            state.init_distributed_environment(
                world_size=dist.get_world_size(), rank=dist.get_rank(), local_rank=local_rank()
            )
        if state._TP is not None:
            # Forgotten, not destroyed: the next layout makes groups of its own.
            state._clear_srt_tp_group()
            names = ("_TP", "_SP", "_DP", "_CFG", "_PP", "_VAE_DECODE", "_DIT", "_VAE", "_REPLICA", "_ENCODER_DP")
            for name in (*names, "_CFG_SP"):
                setattr(state, name, None)
        state.initialize_model_parallel(
            sequence_parallel_degree=ulysses * ring, ulysses_degree=ulysses, ring_degree=ring,
            tensor_parallel_degree=tp, classifier_free_guidance_degree=cfg,
        )
        self.groups = ranks.groups(ranks.slices(), [], None)
        self.sp = state.get_sp_group().device_group if ulysses * ring > 1 else None
        self.tp = state.get_tp_group().device_group if tp > 1 else None


def local_rank() -> int:
    """This process's device."""
    import os

    return int(os.environ.get("LOCAL_RANK", "0"))


class Plugin:
    """The plugin's cache on one or two transformers, driven by the caller's branch and step."""

    def __init__(self, modules: Mapping[str, nn.Module], groups: Groups):
        self.identity: Identity | None = None
        self.model, self.groups = CachedModel(modules), groups
        self.stats = RequestStats(backend="native", enabled=True)

    def begin(self, steps: Mapping[str, tuple[int, int]], settings: Mapping[str, CacheSettings]) -> None:
        """Start a request; ``steps`` are the first step and number of steps of each transformer."""
        self.stats = RequestStats(backend="native", enabled=True)
        total = max(first + count for first, count in steps.values())
        specs = []
        for name, (first, count) in steps.items():
            plan, _ = build_plan(settings[name], count, preset_mask, first_step=first, total_steps=total)
            specs.append(TransformerSpec(name=name, settings=settings[name], plan=plan, first_step=first))
        self.model.prepare(RequestSpec(
            transformers=tuple(specs), stats=self.stats, groups=self.groups,
            identify=lambda name, kwargs: self.identity,
        ))

    def at(self, step: int, branch: str = "cond") -> None:
        """The next forward is that of ``branch`` at ``step``."""
        self.identity = Identity(branch, step)

    def unmount(self) -> None:
        """Give the transformers back."""
        self.model.prepare(None)
        for transformer in self.model.mounted.values():
            transformer.unmount()

    def counts(self) -> dict[str, int]:
        """Computed and cached forwards over all branches."""
        branches = [b for t in self.stats.transformers.values() for b in t.branches.values()]
        return {
            "computed": sum(len(b.computed) for b in branches), "cached": sum(len(b.cached) for b in branches),
        }


def host_config(settings: CacheSettings, num_steps: int, mask: list[int] | None = None) -> Any:
    """The host's form of ``settings``."""
    from sglang.multimodal_gen.runtime.cache.cache_dit_integration import CacheDitConfig

    return CacheDitConfig(
        enabled=True, num_inference_steps=num_steps, steps_computation_mask=mask, steps_computation_policy="dynamic",
        Fn_compute_blocks=settings.Fn_compute_blocks, Bn_compute_blocks=settings.Bn_compute_blocks,
        max_warmup_steps=settings.max_warmup_steps, residual_diff_threshold=settings.residual_diff_threshold,
        max_continuous_cached_steps=settings.max_continuous_cached_steps,
        enable_taylorseer=settings.calibrator == "taylorseer", taylorseer_order=settings.taylorseer_order,
    )


def mount_stock(
    model: nn.Module, settings: CacheSettings, num_steps: int, layout: HostLayout, mask: list[int] | None = None
) -> None:
    """``enable_cache_on_transformer`` of the host."""
    import cache_dit
    from sglang.multimodal_gen.runtime.cache import cache_dit_integration as stock

    _prepare(stock, layout)
    name = type(model).__name__
    pattern = getattr(cache_dit.ForwardPattern, f"Pattern_{PATTERNS[name]}")
    stock._CUSTOM_BLOCK_ADAPTER_SPECS[name] = stock.CustomBlockAdapterSpec(
        blocks_attr="blocks", forward_pattern=pattern
    )
    stock.enable_cache_on_transformer(
        model, host_config(settings, num_steps, mask), name, sp_group=layout.sp, tp_group=layout.tp
    )


def mount_stock_pair(
    high: nn.Module, low: nn.Module, configs: tuple[Any, Any], layout: HostLayout, *, separate_cfg: bool
) -> None:
    """``enable_cache_on_dual_transformer`` of the host, for Wan 2.2."""
    from sglang.multimodal_gen.runtime.cache import cache_dit_integration as stock

    _prepare(stock, layout)
    stock.enable_cache_on_dual_transformer(
        high, low, *configs, model_name="wan2.2", sp_group=layout.sp, tp_group=layout.tp,
        has_separate_cfg=separate_cfg,
    )


def refresh_stock(model: nn.Module, mask: list[int]) -> None:
    """The host's refresh of a mounted transformer before a request."""
    from sglang.multimodal_gen.runtime.cache import cache_dit_integration as stock

    stock.refresh_context_on_transformer(
        model, len(mask), steps_computation_mask=mask, steps_computation_policy="dynamic"
    )


def _prepare(stock: Any, layout: HostLayout) -> None:
    if layout.error:
        # The host's groups are not to be had: its integration is told ours.
        stock.get_ulysses_parallel_world_size = lambda: layout.sizes["ulysses"]
        stock.get_ring_parallel_world_size = lambda: layout.sizes["ring"]
        stock.get_tp_world_size = lambda: layout.sizes["tp"]
        stock.get_classifier_free_guidance_world_size = lambda: layout.sizes["cfg"]
        stock.get_dit_group = lambda: dist.group.WORLD
    # cache-dit 1.5.1 keeps "is cached" on a class, and then mounts no second transformer in a process.
    from cache_dit.caching.block_adapters.block_adapters import FakeDiffusionPipeline

    if "_is_cached" in FakeDiffusionPipeline.__dict__:
        del FakeDiffusionPipeline._is_cached


def stock_counts(*models: nn.Module) -> dict[str, int]:
    """Cached forwards that the host's integration counted on ``models``, by cache-dit's own contexts."""
    managers = {id(model._context_manager): model._context_manager for model in models}
    contexts = [each for manager in managers.values() for each in manager._cached_context_manager.values()]
    cached = sum(len(c.cached_steps) + len(c.cfg_cached_steps) for c in contexts)
    return {"cached": cached}


def device() -> torch.device:
    """This process's device; starts the process group."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank())
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
