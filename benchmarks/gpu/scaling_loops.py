"""Denoising loops of one model size on every layout of this number of ranks: uncached, plugin, stock.

    python -m torch.distributed.run --nproc-per-node N -m benchmarks.gpu.scaling_loops --work flux [--tiny]

Transformers of FLUX and Wan2.2-A14B size in plain torch with random weights (``spread``), driven by the same drifting
inputs, in the host's own process groups. Which steps may be cached is fixed, and each of them is measured, so all
variants compute the same steps and decide as a threshold would have them. ``scaling_table`` runs it on every number of
GPUs. Each measurement is a JSON line, printed and added to --out.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import launch, stock
from benchmarks.gpu.ranks import decision_time
from benchmarks.gpu.spread import Spread, SpreadFlux, SpreadWan, build
from sglang_cachedit_plugin.config.settings import CacheSettings


@dataclass(frozen=True)
class Work:
    """A model size and its loop.

    Args:
        masks: for each transformer which of its steps are computed (1); the others are measured and cached.
        uncached_steps: how many are run uncached; the loop's time is reckoned from them.
        text: tokens of the prompt. ``split_text``: they are cut over the ranks like the others.
    """

    kind: type[nn.Module]
    dim: int
    tokens: dict[str, int]
    masks: tuple[tuple[int, ...], ...]
    branches: tuple[str, ...]
    uncached_steps: int
    text: int = 512
    split_text: bool = False
    numbers: tuple[tuple[str, int], ...] = ()

    @property
    def steps(self) -> int:
        """Of the loop."""
        return sum(map(len, self.masks))


MEDIUM = (1, 1, 1, 1, 1, 1, 0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0, 1, 0, 0, 1)
"""28 steps of which 15 are computed."""

WORKS = {
    "flux": Work(SpreadFlux, 3072, {"1024": 4096, "2048": 16384}, (MEDIUM,), ("cond",), 8, split_text=True),
    "wan": Work(SpreadWan, 5120, {"720p": 21 * 45 * 80}, ((1, 0), (1, 0)), ("cond", "uncond"), 2),
}
TINY = {
    "flux": Work(SpreadFlux, 64, {"1024": 64, "2048": 128}, (MEDIUM,), ("cond",), 4, 16, True,
                 (("double", 1), ("single", 2), ("dim", 64), ("heads", 8))),
    "wan": Work(SpreadWan, 64, {"720p": 64}, ((1, 0), (1, 0)), ("cond", "uncond"), 2, 16, False,
                (("blocks", 3), ("dim", 64), ("ffn", 128), ("heads", 8))),
}


def layouts(world: int, branches: int) -> dict[str, dict[str, int]]:
    """Ways to spread over ``world`` ranks, the most usual first."""
    if world == 1:
        return {"one": {}}
    found = {"ulysses": {"ulysses": world}}
    if branches == 2:
        found["cfg"] = {"cfg": 2, "ulysses": world // 2}
    if branches == 1 or world > 2:
        found["tp"] = {"ulysses": world // 2, "tp": 2}
    return found


class Loop:
    """One work's transformers and inputs on this rank."""

    def __init__(self, work: Work, spread: Spread, device: torch.device):
        self.work, self.spread, self.device = work, spread, device
        names = ("transformer", "transformer_2")[: len(work.masks)]
        self.models = {
            name: build(work.kind, spread, device, seed, **dict(work.numbers)) for seed, name in enumerate(names)
        }
        self.branches = work.branches if spread.rows == 1 else (work.branches[spread.row],)

    def size(self, tokens: int) -> None:
        """Draw inputs of ``tokens`` tokens: a slow, uneven turn over the steps, the same before it is cut."""
        generator = torch.Generator(self.device).manual_seed(7)
        dtype = next(self.models["transformer"].parameters()).dtype

        def drawn(length: int) -> torch.Tensor:
            shape = (1, length, self.work.dim)
            return torch.randn(shape, generator=generator, device=self.device, dtype=dtype)

        self.start, self.end = (self.spread.shard(drawn(tokens)) for _ in range(2))
        words = {branch: drawn(self.work.text) for branch in self.work.branches}
        split = self.spread.shard if self.work.split_text else lambda text: text
        self.words = {branch: split(words[branch]) for branch in self.branches}

    def parts(self) -> dict[str, tuple[int, int]]:
        """First step and number of steps of each transformer."""
        found, first = {}, 0
        for name, mask in zip(self.models, self.work.masks, strict=True):
            found[name] = (first, len(mask))
            first += len(mask)
        return found

    @torch.no_grad()
    def run(self, steps: list[int], before: Callable[[int, str], None] = lambda step, branch: None) -> float:
        """Seconds of ``steps``, the slowest rank's."""
        self.wait()
        started = time.perf_counter()
        for step in steps:
            name = next(name for name, (first, count) in self.parts().items() if step < first + count)
            hidden = math.cos(0.05 * step) * self.start + math.sin(0.05 * step) * self.end
            for branch in self.branches:
                before(step, branch)
                velocity = self.models[name](hidden, encoder_hidden_states=self.words[branch])
            if self.spread.cfg is not None:
                # Guidance takes both branches' outputs.
                dist.all_reduce(velocity, group=self.spread.cfg)
        self.wait()
        seconds = torch.tensor([time.perf_counter() - started], device=self.device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return float(seconds)

    def wait(self) -> None:
        """All ranks have finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    def some_steps(self) -> list[int]:
        """The steps that are run uncached: as many of each transformer."""
        each = self.work.uncached_steps // len(self.models)
        return [first + step for first, _ in self.parts().values() for step in range(each)]


def uncached(loop: Loop) -> dict[str, Any]:
    """The loop's time, reckoned from some of its steps."""
    ran = loop.some_steps()
    seconds = loop.run(ran)
    return {"seconds": seconds * loop.work.steps / len(ran), "ran": len(ran), "computed": loop.work.steps, "cached": 0}


@contextmanager
def plugin(loop: Loop, layout: stock.HostLayout) -> Iterator[Callable[[], dict[str, Any]]]:
    """The plugin mounted; gives what to measure at each size."""
    mounted = stock.Plugin(loop.models, layout.groups)

    def begin(**knobs: Any) -> None:
        settings = {name: settings_of(mask, **knobs) for name, mask in zip(loop.models, loop.work.masks, strict=True)}
        mounted.begin(loop.parts(), settings)

    def measure() -> dict[str, Any]:
        begin(verify_ranks=dist.get_world_size() > 1)
        found = {"seconds": loop.run(list(range(loop.work.steps)), mounted.at), **mounted.counts()}
        decisions = {name: each["branches"] for name, each in mounted.stats.as_dict()["transformers"].items()}
        cache = mounted.model.mounted[list(loop.models)[-1]].cache
        found["decision_us"] = time_of(lambda a, b: cache._measure("blocks", a, b, True), loop)
        return found | {"equal_decisions": equal_over(layout.groups.forward, decisions)}

    try:
        yield measure
    finally:
        mounted.unmount()


THRESHOLD = 0.99
"""Everything that may be cached is; the difference is still measured."""


def settings_of(mask: tuple[int, ...], **knobs: Any) -> CacheSettings:
    """Settings under which exactly the mask's steps are computed, after a measurement of each of the others."""
    return CacheSettings(**{
        "residual_diff_threshold": THRESHOLD, "max_warmup_steps": 1, "max_continuous_cached_steps": -1,
        "steps_computation_mask": mask, **knobs,
    })


@contextmanager
def host_integration(loop: Loop, layout: stock.HostLayout) -> Iterator[Callable[[], dict[str, Any]]]:
    """SGLang's own integration; it cannot be taken off again, so it comes last."""
    work, masks = loop.work, [list(mask) for mask in loop.work.masks]
    models = list(loop.models.values())
    knobs = [settings_of(mask) for mask in work.masks]
    if len(models) == 1:
        stock.mount_stock(models[0], knobs[0], work.steps, layout, masks[0])
    else:
        configs = [stock.host_config(each, len(mask), mask) for each, mask in zip(knobs, masks, strict=True)]
        stock.mount_stock_pair(*models, tuple(configs), layout, separate_cfg=True)

    def measure() -> dict[str, Any]:
        # As the host does before a request; without it another size would meet what is kept of the last.
        for model, mask in zip(models, masks, strict=True):
            stock.refresh_stock(model, mask)
        found = {"seconds": loop.run(list(range(work.steps))), **stock.stock_counts(*models)}
        found["computed"] = work.steps * len(loop.branches) - found["cached"]
        manager = models[-1]._context_manager
        call = lambda a, b: manager.similarity(a, b, threshold=THRESHOLD, parallelized=True)  # noqa: E731
        return found | {"decision_us": time_of(call, loop)}

    yield measure


def time_of(decide: Callable[[torch.Tensor, torch.Tensor], Any], loop: Loop) -> float:
    """Median microseconds of a decision about two residuals of this size."""
    other = loop.start * 1.1
    return round(decision_time(lambda: decide(loop.start, other), loop), 1)


def equal_over(group: Any, value: Any) -> bool:
    """Whether all ranks of ``group`` hold the same."""
    if group is None:
        return True
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, value, group=group)
    return all(each == value for each in everyone)


def communication(loop: Loop) -> float | None:
    """Share of an uncached step spent in NCCL's kernels, waiting for other ranks included."""
    if loop.device.type != "cuda" or dist.get_world_size() == 1:
        return None
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            seconds = loop.run([0, 1])
        spent = sum(each.device_time_total for each in profiled.key_averages() if "nccl" in each.key.lower())
    except (RuntimeError, AttributeError):
        return None
    return round(spent / 1e6 / seconds, 3)


VARIANTS = {"plugin": plugin, "stock": host_integration}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", choices=WORKS, required=True)
    parser.add_argument("--layouts", help="by comma; all by default")
    parser.add_argument("--variants", default="uncached,plugin,stock")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", help="file for JSON lines")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = stock.device()
    world, work = dist.get_world_size(), (TINY if args.tiny else WORKS)[args.work]
    known = layouts(world, len(work.branches))
    for name in args.layouts.split(",") if args.layouts else known:
        measure_layout(args, work, {"ulysses": 1, "ring": 1, "tp": 1, "cfg": 1} | known[name], device)
    # Groups of several layouts are still open; leaving is quicker and cannot hang.
    os._exit(0)


def measure_layout(args: argparse.Namespace, work: Work, axes: dict[str, int], device: torch.device) -> None:
    """All variants and sizes of one layout. What fails is noted; the others are still measured."""
    spread = Spread.build(**axes)
    # Imports SGLang, which switches cuDNN's attention off: before the first measurement, so for all of them.
    layout = stock.HostLayout(spread, **axes)
    loop = Loop(work, spread, device)

    def note(size: str, variant: str, row: dict[str, Any]) -> None:
        peak = round(torch.cuda.max_memory_allocated() / 2**30, 1) if device.type == "cuda" else None
        row = {"work": args.work, "gpus": dist.get_world_size(), "layout": spread.name, "size": size,
               "variant": variant, "steps": work.steps, "peak_gib": peak, **row}
        if dist.get_rank() == 0:
            launch.keep(row, args.out)

    # As many as every number of ranks divides. What happens only once happens here.
    few = max(64, min(work.tokens.values()) // 512 * 64)
    loop.size(few)
    loop.run(loop.some_steps())
    for variant in args.variants.split(","):
        try:
            if variant == "uncached":
                for size, tokens in work.tokens.items():
                    loop.size(tokens)
                    share = communication(loop) if args.work == "flux" else None
                    note(size, variant, uncached(loop) | {"communication": share})
                continue
            if variant == "stock" and (spread.rows > 1 or (args.work == "wan" and spread.tp is not None)):
                # It tells branches by counting forwards, which one branch a rank upsets; under TP it would take
                # half a minute to say what FLUX says too.
                continue
            with VARIANTS[variant](loop, layout) as measure:
                loop.size(few)
                measure()
                for size, tokens in work.tokens.items():
                    loop.size(tokens)
                    note(size, variant, measure())
        except Exception as error:
            note("all", variant, {"why": f"{type(error).__name__}: {error}"[:300]})
    del loop
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
