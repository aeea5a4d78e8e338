"""One pipeline under one config file on the ranks of torch.distributed: time, memory, report, equality of ranks.

Nothing here imports SGLang, so attention is what PyTorch chooses, cuDNN's too, for all variants alike.
"""

from __future__ import annotations

import gc
import hashlib
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu import pipelines
from sglang_cachedit_plugin.config import diffusers_sections
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.config.sources import read_file
from sglang_cachedit_plugin.integration import cache_dit_sections
from sglang_cachedit_plugin.integration.diffusers import PipelineCache
from sglang_cachedit_plugin.integration.request import Session

CACHE = {"max_warmup_steps": 8, "warmup_interval": 2, "max_continuous_cached_steps": 2,
         "residual_diff_threshold": 0.12, "enable_taylorseer": True}
"""What recipes without a cache_config are also run with: the cache of the hybrid recipe."""


def start() -> tuple[int, int, torch.device]:
    """Join the ranks that torchrun started; rank, world and device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available() and os.environ.get("RECIPES_DEVICE") != "cpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
        ring_on_cpu()
    backend = "cpu:gloo,cuda:nccl" if cuda else "cpu:gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=240), device_id=device if cuda else None)
    return rank, world, device


def ring_on_cpu() -> None:
    """A reference of the CUDA operator that cache-dit's ring calls, so that a ring can be tried on the CPU.

    PyTorch has attention with its log-sum-exp on the CPU too, under another name. cache-dit's merge of partial
    results is a triton kernel with a fallback in PyTorch.
    """
    from cache_dit.distributed.core import _templated_ring, _templated_usp

    def attention(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, scale=scale
        )
        empty = torch.empty(0)
        return out, lse, empty, empty, query.shape[2], key.shape[2], empty, empty, empty

    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_flash_attention", attention, "CPU")
    ring_on_cpu.library = library
    for module in (_templated_ring, _templated_usp):
        if hasattr(module, "fused_merge_attn_states"):
            module.fused_merge_attn_states = None


def machine(device: torch.device, sections: Mapping[str, Any]) -> diffusers_sections.Machine:
    """This machine as the preflight sees it."""
    from importlib.metadata import version

    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    # A ring has a kernel on the CPU here, see ring_on_cpu.
    ring = sections.get("parallelism_config", {}).get("ring_size", 1) != 1
    kind = None if ring and device.type == "cpu" else device.type
    return diffusers_sections.Machine(device=kind, capability=capability, cache_dit=version("cache-dit"))


class Job:
    """A pipeline, split and quantised as a config says, and ready to draw.

    Args:
        config: path or mapping of a config file; an empty mapping leaves the pipeline alone.
        family: ``flux`` or ``qwen``.
        size: of the weights, see ``pipelines``.
        stock: cache-dit's own ``enable_cache`` in the plugin's place.
    """

    def __init__(
        self, config: str | Mapping[str, Any], family: str, size: str, device: torch.device, *, stock: bool = False
    ):
        self.device, self.family = device, family
        self.file = read_file(config)
        given = self.file.passed_on
        sections = diffusers_sections.fit(given, dist.get_world_size(), machine(device, given), "config")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.pipe = pipelines.PIPELINES[family](size, device, dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.cache = PipelineCache(self.pipe)
        self.call: dict[str, Any] = {}
        if stock:
            enable_stock(self.pipe, sections)
            return
        self.cache.mount()
        if sections:
            cache_dit_sections.apply(self.pipe, sections)
            self.cache.identify_outside()

    def frame(self, width: int, height: int, frames: int = 1) -> None:
        """What is drawn, by family."""
        self.call = dict(prompt="a red apple", width=width, height=height)
        if self.family == "flux":
            self.call["max_sequence_length"] = 512
        elif self.family == "qwen":
            self.call |= dict(
                prompt=self.prompt("a red apple"), negative_prompt=self.prompt("blurred"), true_cfg_scale=4.0
            )
        else:
            self.call |= dict(num_frames=frames, guidance_scale=4.0)

    def shape(self, width: int, height: int, frames: int = 1) -> tuple[int, int]:
        """Tokens and width of the hidden states."""
        config = self.pipe.transformer.config
        latent = (frames - 1) // 4 + 1 if self.family == "wan" else 1
        return latent * (width // 16) * (height // 16), config.num_attention_heads * config.attention_head_dim

    def prompt(self, text: str) -> str:
        """``text`` with as many tokens as 8 ranks divide; Ulysses without ``ulysses_anything`` needs that."""
        if not hasattr(self.pipe, "text_encoder_2"):
            while self.pipe.encode_prompt(text, device=self.device)[0].shape[1] % 8:
                text += "."
        return text

    def draw(self, params: Mapping[str, Any] | None, steps: int) -> tuple[torch.Tensor, dict[str, Any] | None]:
        """The picture (1, 3, height, width) and the report; ``params`` None draws uncached."""
        call = dict(
            num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(7), output_type="pt", **self.call
        )
        with torch.no_grad():
            if params is None:
                return _picture(self.pipe(**call)), None
            session = Session("diffusers", Defaults(file=self.file).decide(True, params))
            with self.cache.request(session, steps):
                picture = _picture(self.pipe(**call))
        return picture, session.close(self.device).as_dict()

    def measure(self, params: Mapping[str, Any] | None, steps: int) -> dict[str, Any]:
        """Seconds of a picture after a first one, peak memory over ranks, the report, whether ranks agree."""
        self.draw(params, min(steps, 12))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        dist.barrier()
        started = time.perf_counter()
        picture, report = self.draw(params, steps)
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
        branches = {
            (transformer, name): branch
            for transformer, each in (report or {"transformers": {}})["transformers"].items()
            for name, branch in each["branches"].items()
        }
        decisions = {name: branch["cached"] for name, branch in branches.items()}
        own = {
            "seconds": seconds, "gib": peak, "picture": hashlib.sha256(picture.numpy().tobytes()).hexdigest(),
            "decisions": decisions,
        }
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        diffs = sorted(diff for branch in branches.values() for diff in branch["residual_diffs"].values())
        return {
            "picture": picture,
            "seconds": round(max(each["seconds"] for each in ranks), 3),
            "peak_gib": round(max(each["gib"] for each in ranks), 2),
            "computed": report["computed_steps"] if report else steps,
            "cached": report["cached_steps"] if report else 0,
            "diffs": diffs[:: max(1, len(diffs) // 3)],
            "reason": report["reason"] if report else None,
            "notes": report.get("notes") if report else None,
            "equal_pictures": len({each["picture"] for each in ranks}) == 1,
            "equal_decisions": all(each["decisions"] == decisions for each in ranks),
        }

    def close(self) -> None:
        """Free the weights."""
        del self.pipe, self.cache
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _picture(output: Any) -> torch.Tensor:
    return (output.images if hasattr(output, "images") else output.frames).float().cpu()


def enable_stock(pipe: Any, sections: Mapping[str, Any]) -> None:
    """cache-dit alone with the settings of ``CACHE``."""
    import cache_dit

    knobs = {name: value for name, value in CACHE.items() if not name.startswith("enable")}
    given = cache_dit.load_configs(dict(sections)) if sections else {}
    cache_dit.enable_cache(pipe, **given | {
        "cache_config": cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, **knobs),
        "calibrator_config": cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1),
    })


def difference(picture: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square difference over the reference's standard deviation."""
    return float((picture - reference).pow(2).mean().sqrt() / reference.std())
