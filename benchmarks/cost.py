"""Time and memory of corrector and error control at FLUX.1's size: ``python -m benchmarks.cost``.

Random weights on one GPU, 1024x1024, 28 steps, the denoising loop of diffusers' pipeline with the plugin's cache in it.
Variants take turns; printed are medians of the denoising time, the peak of the memory beside the weights, and how often
the host waited for the device.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any

import torch

from benchmarks.gpu import pipelines
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.integration.diffusers import PipelineCache
from sglang_cachedit_plugin.integration.request import Session

MASK = [1, 1, 1, 1, 0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1]
RESIDUAL = {"steps_computation_mask": MASK, "steps_computation_policy": "static", "max_warmup_steps": 0}
OUTPUT = {**RESIDUAL, "forecast": "output"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__)
    parser.add_argument("--size", default="full", choices=pipelines.FLUX_SIZES)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.set_grad_enabled(False)
    pipe = pipelines.PIPELINES["flux"](args.size, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    cache = PipelineCache(pipe)
    cache.mount()
    embeddings = pipe.encode_prompt("a red apple", None, device=device, max_sequence_length=512)

    def draw(settings: dict[str, Any]) -> tuple[float, float, int, Session]:
        session = Session("diffusers", Defaults().decide(True, settings))
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught, cache.request(session, len(MASK)):
            warnings.simplefilter("always")
            begun = time.perf_counter()
            pipe(
                prompt_embeds=embeddings[0], pooled_prompt_embeds=embeddings[1], width=args.pixels,
                height=args.pixels, num_inference_steps=len(MASK), output_type="latent",
                generator=torch.Generator().manual_seed(1),
            )
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begun
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if device.type == "cuda" else 0.0
        session.close(device)
        return seconds, peak, sum("synchroniz" in str(each.message) for each in caught), session

    # Random weights: the tolerance is such that about as many steps are computed as in the mask.
    controlled = {"error_tolerance": 0.02}
    _, _, _, session = draw(controlled)
    computed = session.stats.transformers["transformer"].branches["cond"].computed
    same = [int(step in computed) for step in range(len(MASK))]
    variants = {
        "residual, static, corrector off": {**RESIDUAL, "corrector": False},
        "residual, static, corrector on": RESIDUAL,
        "output, static, corrector off": {**OUTPUT, "corrector": False},
        "output, static, corrector on": OUTPUT,
        f"error control, {len(computed)} computed": controlled,
        f"the same {len(computed)} steps, static": {**OUTPUT, "steps_computation_mask": same},
    }
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in variants}
    for _ in range(args.rounds + 1):
        for name, settings in variants.items():
            found[name].append(draw(settings)[:3])
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"FLUX {args.size}, {args.pixels}x{args.pixels}, {sum(MASK)} of {len(MASK)} computed, {dtype}, {card}")
    print("| variant | seconds (median) | min | MiB beside the weights | waits of the host |\n|---|---|---|---|---|")
    for name, rows in found.items():
        rows = rows[1:]
        times = [row[0] for row in rows]
        median = statistics.median(times)
        print(f"| {name} | {median:.3f} | {min(times):.3f} | {max(row[1] for row in rows):.1f} | {rows[-1][2]} |")


if __name__ == "__main__":
    main()
