"""Decisions of ranks that share a forward: the host's integration against the plugin, in one run.

    python -m torch.distributed.run --nproc-per-node N -m benchmarks.gpu.ranks [--tiny] [--only ulysses,tp,mixed,ring]

Transformers of FLUX and Wan size with random weights, driven by the same drifting inputs. For each layout: time of
a step uncached, stock and with the plugin; collectives and waits for the device in each decision, counted by the
profiler; time of one decision; 200 steps with ``verify_ranks``. Prints a table and writes ranks.json to $OUT.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu import stock
from benchmarks.gpu.spread import Spread, SpreadFlux, SpreadWan, build
from sglang_cachedit_plugin.cache import branch_cache
from sglang_cachedit_plugin.config.settings import CacheSettings

STEPS, PROFILED, VERIFIED, REPEATS = 40, 12, 200, 50
COLLECTIVES = ("c10d::allreduce_", "c10d::allgather_", "c10d::_allgather_base_", "c10d::broadcast_", "c10d::barrier")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
READS = ("item", "tolist")
KINDS = {"collectives": COLLECTIVES, "reads": ("read",), "waits": WAITS}


def inputs(tokens: int, dim: int, text: int, spread: Spread, device: torch.device) -> Callable[[int], tuple]:
    """Hidden and encoder states of each step: a slow, uneven turn, the same on every rank before it is cut."""
    generator = torch.Generator().manual_seed(7)
    start, end, words = (torch.randn(1, n, dim, generator=generator) for n in (tokens, tokens, text))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    turns = torch.rand(10_000, generator=generator).cumsum(0) * 0.14
    start, end = (spread.shard(each).to(device, dtype) for each in (start, end))
    words = words.to(device, dtype)

    def at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        angle = float(turns[step])
        return math.cos(angle) * start + math.sin(angle) * end, words

    return at


class Case:
    """One model on one layout."""

    def __init__(self, name: str, model: nn.Module, at: Callable, split_text: Callable, device: torch.device):
        self.name, self.model, self.at, self.split_text, self.device = name, model, at, split_text, device

    @torch.no_grad()
    def run(self, steps: int, before: Callable[[int], None] = lambda step: None) -> float:
        """Drive ``steps`` forwards; seconds a step, the slowest rank's."""
        self.wait()
        started = time.perf_counter()
        for step in range(steps):
            before(step)
            hidden, words = self.at(step)
            self.model(hidden, encoder_hidden_states=self.split_text(words))
        self.wait()
        seconds = torch.tensor([(time.perf_counter() - started) / steps], device=self.device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return float(seconds)

    def wait(self) -> None:
        """All ranks have finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()


@contextmanager
def marked(owner: type, names: tuple[str, ...], mark: str) -> Iterator[None]:
    """Calls of the named methods show up in a profile as ``mark``."""
    originals = {name: getattr(owner, name) for name in names}

    def wrap(function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(mark):
                return function(*args, **kwargs)

        return call

    for name, function in originals.items():
        setattr(owner, name, wrap(function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(owner, name, function)


def counted(case: Case, owner: type, steps: int, before: Callable[[int], None]) -> dict[str, Any]:
    """Collectives, values read by the host and waits for the device in each measured decision."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if case.device.type == "cuda" else [])
    with (
        marked(owner, tuple(name for name in ("decide", "can_cache") if hasattr(owner, name)), "decision"),
        marked(torch.Tensor, READS, "read"),
        profile(activities=activities, acc_events=True) as profiled,
    ):
        case.run(steps, before)
    events = [(e.time_range.start, e.time_range.end, e.name) for e in profiled.events()]
    rows = []
    for start, end, name in events:
        if name == "decision":
            inside = [other for begun, _, other in events if start <= begun <= end]
            rows.append({kind: sum(other in names for other in inside) for kind, names in KINDS.items()})
    measured = [row for row in rows if row["collectives"]]
    means = {kind: round(statistics.mean(row[kind] for row in measured), 2) for kind in KINDS} if measured else {}
    return {"decisions": len(rows), "with_collective": len(measured)} | means


def decision_time(decide: Callable[[], Any], case: Case) -> float:
    """Median microseconds of one decision with nothing else under way."""
    times = []
    for _ in range(REPEATS):
        case.wait()
        started = time.perf_counter()
        decide()
        if case.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - started))
    return statistics.median(times)


def same_sums(plugin: stock.Plugin, case: Case, settings: CacheSettings, steps: int) -> dict[str, int]:
    """Of the decisions of a TP group, how many have the same sums to the last bit on all ranks before reducing."""
    seen: list[torch.Tensor] = []
    own = branch_cache.residual_sums

    def recorded(*args: Any) -> torch.Tensor:
        seen.append(own(*args))
        return seen[-1]

    branch_cache.residual_sums = recorded
    try:
        plugin.begin({"transformer": (0, steps)}, {"transformer": settings})
        case.run(steps, plugin.at)
    finally:
        branch_cache.residual_sums = own
    if not seen:
        return {"decisions": 0, "equal": 0}
    mine = torch.stack(seen)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    equal = torch.stack([(each == everyone[0]).all(-1) for each in everyone]).all(0)
    return {"decisions": len(seen), "equal": int(equal.sum())}


def with_plugin(case: Case, layout: stock.HostLayout, settings: CacheSettings, tp_only: bool) -> dict[str, Any]:
    """Everything that is measured with the plugin."""
    plugin = stock.Plugin({"transformer": case.model}, layout.groups)

    def begin(steps: int, **changes: Any) -> None:
        values = {name: getattr(settings, name) for name in settings.__dataclass_fields__} | changes
        plugin.begin({"transformer": (0, steps)}, {"transformer": CacheSettings(**values)})

    begin(STEPS)
    found: dict[str, Any] = {"step_ms": 1e3 * case.run(STEPS, plugin.at), **plugin.counts()}
    begin(PROFILED)
    found |= counted(case, branch_cache.BranchCache, PROFILED, plugin.at)
    cache = plugin.model.mounted["transformer"].cache
    tensor = case.at(0)[0]
    other = tensor * 1.1
    begin(STEPS)
    case.run(2, plugin.at)
    found["decision_us"] = decision_time(lambda: cache._measure("blocks", tensor, other, True), case)
    if tp_only:
        found["same_sums"] = same_sums(plugin, case, settings, STEPS)
    begin(VERIFIED, verify_ranks=True)
    try:
        case.run(VERIFIED, plugin.at)
        found["verified"] = {"steps": VERIFIED, "disagreements": 0, **plugin.counts()}
    except Exception as error:
        found["verified"] = {"error": f"{type(error).__name__}: {error}"}
    plugin.unmount()
    return found


def with_stock(case: Case, layout: stock.HostLayout, settings: CacheSettings) -> dict[str, Any]:
    """The same with the host's integration; it cannot be taken off again, so it comes last."""
    from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager

    total = STEPS + PROFILED
    stock.mount_stock(case.model, settings, STEPS, layout)
    found: dict[str, Any] = {"step_ms": 1e3 * case.run(STEPS), **stock.stock_counts(case.model)}
    found["computed"] = STEPS - found["cached"]
    found |= counted(case, CachedContextManager, PROFILED, lambda step: None)
    tensor = case.at(0)[0]
    other = tensor * 1.1
    manager = case.model._context_manager
    found["decision_us"] = decision_time(
        lambda: manager.similarity(tensor, other, threshold=settings.residual_diff_threshold, parallelized=True), case
    )
    return found | {"steps": total}


def cases(tiny: bool, spread: Spread, device: torch.device, seconds: Callable[[], float]) -> Iterator[Case]:
    """FLUX and Wan size, one after the other; the later one is left out where time runs short."""
    sizes: dict[str, Any] = {
        "FLUX": (SpreadFlux, {}, 4096, 512, 3072, spread.shard),
        # As many blocks of Wan as fit the time: the decision does not depend on their number.
        "Wan": (SpreadWan, {"blocks": 8}, 8192, 512, 5120, lambda words: words),
    }
    if tiny:
        sizes = {
            "FLUX": (SpreadFlux, {"double": 1, "single": 2, "dim": 64, "heads": 8}, 64, 16, 64, spread.shard),
            "Wan": (SpreadWan, {"blocks": 3, "dim": 64, "ffn": 128, "heads": 8}, 64, 16, 64, lambda words: words),
        }
    for name, (kind, numbers, tokens, text, dim, split_text) in sizes.items():
        if seconds() < 20:
            return
        model = build(kind, spread, device, **numbers)
        yield Case(name, model, inputs(tokens, dim, text, spread, device), split_text, device)


def layouts(world: int) -> dict[str, dict[str, int]]:
    """The layouts that this number of ranks allows."""
    found = {"ulysses": {"ulysses": world}, "tp": {"tp": world}}
    if world >= 4 and world % 2 == 0:
        found["mixed"] = {"ulysses": world // 2, "tp": 2}
    return found | {"ring": {"ring": world}}


def measure(case: Case, layout: stock.HostLayout, settings: CacheSettings, tp_only: bool) -> dict[str, Any]:
    """One row: uncached, plugin and stock. What fails is noted; the others are still measured."""
    case.run(2)
    row: dict[str, Any] = {"uncached": {"step_ms": 1e3 * case.run(6)}}
    for name, run in (
        ("plugin", lambda: with_plugin(case, layout, settings, tp_only)),
        ("stock", lambda: with_stock(case, layout, settings)),
    ):
        try:
            row[name] = run()
        except Exception as error:
            row[name] = {"error": f"{type(error).__name__}: {error}"}
    return row


def table(results: list[dict[str, Any]]) -> str:
    """The rows as text."""
    heads = ["layout", "model", "variant", "ms a step", "cached of all", *KINDS, "decision us", "200 steps"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in results:
        for variant in ("uncached", "stock", "plugin"):
            found = row[variant]
            if "error" in found:
                lines.append(f"| {row['layout']} | {row['model']} | {variant} | {found['error'][:90]} |")
                continue
            verified = found.get("verified", {})
            lines.append(
                f"| {row['layout']} | {row['model']} | {variant} | {found['step_ms']:.1f} | "
                + (f"{found['cached']} of {STEPS}" if "cached" in found else "")
                + " | ".join(["", *(str(found.get(kind, "")) for kind in KINDS), ""])
                + (f"{found['decision_us']:.0f}" if "decision_us" in found else "")
                + f" | {verified.get('error', verified.get('disagreements', ''))} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a run without GPUs")
    parser.add_argument("--only", default="", help="layouts, by comma")
    parser.add_argument("--seconds", type=float, default=200.0, help="start no new model after this long")
    options = parser.parse_args()
    started = time.perf_counter()
    torch.set_num_threads(1)
    device = stock.device()
    settings = CacheSettings(residual_diff_threshold=0.24, max_warmup_steps=4, max_continuous_cached_steps=3)
    chosen = [name for name in layouts(dist.get_world_size()) if not options.only or name in options.only.split(",")]
    results: list[dict[str, Any]] = []
    for name in chosen:
        axes = {"ulysses": 1, "ring": 1, "tp": 1} | layouts(dist.get_world_size())[name]
        spread = Spread.build(**axes)
        layout = stock.HostLayout(spread, **axes)

        def left() -> float:
            # One clock for all ranks: they must start the same models.
            now = torch.tensor([options.seconds - (time.perf_counter() - started)], device=device)
            dist.broadcast(now, 0)
            return float(now)

        for case in cases(options.tiny, spread, device, left):
            if name == "ring" and case.name != "FLUX":
                continue
            row = measure(case, layout, settings, tp_only=name == "tp")
            results.append({"layout": spread.name, "model": case.name, "host_groups": layout.error or "host"} | row)
            if dist.get_rank() == 0:
                print(table(results[-1:]), flush=True)
                write(results, device)
            case.model = None
            del case
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if dist.get_rank() == 0:
        print(f"\n{dist.get_world_size()} ranks, {time.perf_counter() - started:.0f} s\n{table(results)}", flush=True)
    # Groups of several layouts are still open; leaving is quicker and cannot hang.
    os._exit(0)


def write(results: list[dict[str, Any]], device: torch.device) -> None:
    """Results so far, so that a run that is cut short leaves them."""
    if out := os.environ.get("OUT"):
        machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        found = {"machine": machine, "ranks": dist.get_world_size(), "torch": torch.__version__, "rows": results}
        Path(out, "ranks.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
