"""The work of https://github.com/sgl-project/sglang/pull/15163 with random weights: Wan2.2-A14B size, Ulysses.

    python -m torch.distributed.run --nproc-per-node 4 -m benchmarks.gpu.wan22_ulysses [--steps 40] [--tiny]

Two experts of 14 B parameters, 720x1280, 81 frames (75,600 tokens), guidance with two forwards a step, flow shift 12,
boundary 0.875, and the knobs of that pull request. The denoising loop runs uncached, with the host's own
integration and with the plugin, in one process a rank; uncached only as many steps as its time a step needs.
Random weights do not make a video: times and decisions are real, what the threshold finds similar is not Wan's.
Prints a table and writes wan22.json to $OUT.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.gpu import stock
from benchmarks.gpu.spread import Matrix, Spread, SpreadWan, build, norm
from sglang_cachedit_plugin.config.settings import CacheSettings

PRIMARY = {
    "Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 4, "max_continuous_cached_steps": 8,
    "residual_diff_threshold": 0.24, "enable_taylorseer": True,
    "steps_computation_mask": "fast", "steps_computation_policy": "dynamic",
}
SECONDARY = PRIMARY | {"max_warmup_steps": 2, "max_continuous_cached_steps": 20}
SHIFT, BOUNDARY, GUIDANCE, LATENT = 12.0, 0.875, 3.5, 64


class Expert(SpreadWan):
    """The blocks with what turns patches into tokens and back, and a step embedding."""

    def __init__(self, spread: Spread, dim: int = 5120, **sizes: int):
        super().__init__(spread, dim=dim, **sizes)
        self.patches, self.velocity, self.time = Matrix(LATENT, dim), Matrix(dim, LATENT), Matrix(64, dim)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, sigma: float) -> torch.Tensor:
        waves = torch.tensor([sigma * 2 ** (k / 8) for k in range(32)], device=hidden_states.device)
        embedding = self.time(torch.cat([waves.sin(), waves.cos()]).to(hidden_states.dtype))
        tokens = self.patches(hidden_states) + embedding
        return self.velocity(super().forward(tokens, encoder_hidden_states))


def sigmas(num_steps: int) -> list[float]:
    """Noise levels of each step and 0 at the end."""
    plain = [1 - step / num_steps for step in range(num_steps)]
    return [SHIFT * s / (1 + (SHIFT - 1) * s) for s in plain] + [0.0]


def split(num_steps: int) -> dict[str, tuple[int, int]]:
    """First step and number of steps of the experts."""
    high = sum(sigma >= BOUNDARY for sigma in sigmas(num_steps)[:-1])
    return {"transformer": (0, high), "transformer_2": (high, num_steps - high)}


class Work:
    """Latents, text and the two experts of one rank."""

    def __init__(self, tiny: bool, spread: Spread, device: torch.device):
        sizes = {"blocks": 3, "dim": 64, "ffn": 128, "heads": 8} if tiny else {}
        frames, height, width = (2, 8, 8) if tiny else (21, 45, 80)
        self.tokens = frames * height * width
        self.device = device
        self.experts: dict[str, nn.Module] = {
            name: build(Expert, spread, device, seed, **sizes)
            for seed, name in enumerate(("transformer", "transformer_2"))
        }
        dtype = next(self.experts["transformer"].parameters()).dtype
        generator = torch.Generator().manual_seed(3)
        self.noise = spread.shard(torch.randn(1, self.tokens, LATENT, generator=generator)).to(device, dtype)
        self.text = {
            branch: torch.randn(1, 512, sizes.get("dim", 5120), generator=generator).to(device, dtype)
            for branch in ("cond", "uncond")
        }

    @torch.no_grad()
    def denoise(self, num_steps: int, *, only: int | None = None, at: Callable[[int, str], None] | None = None) -> dict:
        """Run ``num_steps`` steps, or the first and last of them with ``only``; seconds and final latents."""
        levels, parts = sigmas(num_steps), split(num_steps)
        steps = list(range(num_steps))
        if only is not None:
            steps = steps[: only // 2] + steps[-(only - only // 2) :]
        x, times = self.noise, []
        for step in steps:
            self.wait()
            started = time.perf_counter()
            name = "transformer" if step < parts["transformer"][1] else "transformer_2"
            velocity = {}
            for branch, text in self.text.items():
                if at is not None:
                    at(step, branch)
                velocity[branch] = self.experts[name](x, encoder_hidden_states=text, sigma=levels[step])
            guided = velocity["uncond"] + GUIDANCE * (velocity["cond"] - velocity["uncond"])
            x = x + (levels[step + 1] - levels[step]) * norm(guided)
            self.wait()
            times.append(time.perf_counter() - started)
        return {"seconds": sum(times), "step_s": [round(t, 4) for t in times], "finite": bool(x.isfinite().all())}

    def wait(self) -> None:
        """All ranks are here."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()


class Counted:
    """Counts all-reduces of a few values: decisions, not the model's."""

    def __init__(self) -> None:
        self.calls = 0
        self._own = dist.all_reduce

    def __enter__(self) -> Counted:
        def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls += tensor.numel() < 64
            return self._own(tensor, *args, **kwargs)

        dist.all_reduce = all_reduce
        return self

    def __exit__(self, *exc: object) -> None:
        dist.all_reduce = self._own


def run_plugin(work: Work, layout: stock.HostLayout, num_steps: int) -> dict[str, Any]:
    """The plugin's loop."""
    plugin = stock.Plugin(work.experts, layout.groups)
    try:
        knobs = {"transformer": CacheSettings(**PRIMARY), "transformer_2": CacheSettings(**SECONDARY)}
        plugin.begin(split(num_steps), knobs)
        with Counted() as counted:
            found = work.denoise(num_steps, at=plugin.at)
        found |= {"decision_collectives": counted.calls, "report": plugin.stats.as_dict()["transformers"]}
        return found | plugin.counts()
    finally:
        plugin.unmount()


def run_stock(work: Work, layout: stock.HostLayout, num_steps: int) -> dict[str, Any]:
    """The host's loop; its integration cannot be taken off again, so it comes last."""
    from sglang.multimodal_gen.runtime.cache.cache_dit_integration import get_scm_mask

    configs = []
    for (_, count), knobs in zip(split(num_steps).values(), (PRIMARY, SECONDARY), strict=True):
        mask = get_scm_mask("fast", count) if count >= 8 else None
        configs.append(stock.host_config(CacheSettings(**knobs), count, mask))
    stock.mount_stock_pair(*work.experts.values(), tuple(configs), layout, separate_cfg=True)
    with Counted() as counted:
        found = work.denoise(num_steps)
    found |= stock.stock_counts(*work.experts.values()) | {"decision_collectives": counted.calls}
    return found | {"computed": 2 * num_steps - found["cached"]}


def report(results: dict[str, Any]) -> str:
    """The table."""
    steps = results["steps"]
    lines = ["| variant | denoising s | forwards cached | small all-reduces | steps |", "|---|---|---|---|---|"]
    for name in ("uncached", "stock", "plugin"):
        found = results.get(name, {})
        if "error" in found or not found:
            lines.append(f"| {name} | {found.get('error', 'not run')} |")
            continue
        cached = f"{found['cached']} of {2 * steps}" if "cached" in found else "0"
        ran = found.get("ran", steps)
        whole = found["seconds"] * steps / ran
        small = found.get("decision_collectives", "")
        lines.append(f"| {name} | {whole:.1f} | {cached} | {small} | {ran} of {steps} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--uncached-steps", type=int, default=4, help="steps that are really run uncached")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = stock.device()
    world = dist.get_world_size()
    axes = {"ulysses": world, "ring": 1, "tp": 1}
    spread = Spread.build(**axes)
    layout = stock.HostLayout(spread, **axes)
    work = Work(options.tiny, spread, device)
    results: dict[str, Any] = {
        "ranks": world, "steps": options.steps, "split": split(options.steps), "tokens": work.tokens,
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else "CPU", "torch": torch.__version__,
        "host_groups": layout.error or "host",
    }
    work.denoise(options.steps, only=2)
    uncached = min(options.uncached_steps, options.steps)
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "uncached": lambda: work.denoise(options.steps, only=uncached) | {"ran": uncached},
        "plugin": lambda: run_plugin(work, layout, options.steps),
        "stock": lambda: run_stock(work, layout, options.steps),
    }
    for name, run in runs.items():
        try:
            results[name] = run()
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        if device.type == "cuda":
            results[name]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if dist.get_rank() == 0:
            print(report(results), flush=True)
            if out := os.environ.get("OUT"):
                Path(out, "wan22.json").write_text(json.dumps(results, indent=1))
    if dist.get_rank() == 0 and not math.isnan(results["uncached"].get("seconds", math.nan)):
        print(f"uncached step {results['uncached']['seconds'] / uncached:.2f} s", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
