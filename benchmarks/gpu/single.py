"""One GPU: the host's integration against the plugin on full-size transformers with random weights, in one run.

    python -m benchmarks.gpu.single [--tiny] [--only flux1024,flux512,qwen1328,wan480,wan720,memory,compile,decision,
        works]

A model's name may end in ":static" or ":dynamic" for one kind of schedule. "works" is works.py.

The transformers are diffusers' own, the loop is driven in process: time and memory are real, pictures are not.
Stock is ``enable_cache_on_transformer`` of SGLang, and all run under the attention that SGLang leaves: without cuDNN's.
Prints tables and writes single.json to $OUT.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import launch
from benchmarks.gpu.models import Work, build
from sglang_cachedit_plugin.cache import similarity
from sglang_cachedit_plugin.cache.cached_model import CachedModel, preset_mask
from sglang_cachedit_plugin.cache.similarity import residual_sums
from sglang_cachedit_plugin.cache.spec import Identity, RequestSpec, TransformerSpec
from sglang_cachedit_plugin.cache.step_plan import build_plan
from sglang_cachedit_plugin.cache.warmup import Warmup
from sglang_cachedit_plugin.config.settings import CacheSettings
from sglang_cachedit_plugin.report.stats import RequestStats

DYNAMIC = {"residual_diff_threshold": 0.99, "max_warmup_steps": 2, "max_continuous_cached_steps": 3}
VARIANTS = {"stock": {}, "plugin": {}, "plugin, output": {"forecast": "output"}}
CALIBRATORS = {
    "DBCache": {},
    "TaylorSeer 1": {"enable_taylorseer": True, "taylorseer_order": 1},
    "TaylorSeer 2": {"enable_taylorseer": True, "taylorseer_order": 2},
    "DMD 6": {"enable_dmd": True, "dmd_history": 6},
}


def sync() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Plugin:
    """The plugin on the transformers of a Work."""

    def __init__(self, work: Work):
        self.work = work
        self.model = CachedModel(work.modules)
        self.model.mount()

    def begin(self, knobs: dict[str, Any] | None, steps: int, **more: Any) -> float:
        """Start a request, ``more`` as in RequestSpec; milliseconds of the transition."""
        self.stats = RequestStats(backend="native", enabled=knobs is not None)
        started = time.perf_counter()
        if knobs is None:
            self.model.prepare(None)
            return 1e3 * (time.perf_counter() - started)
        settings = CacheSettings(**knobs)
        specs = []
        for name, (first, count) in self.work.split(steps).items():
            plan, _ = build_plan(settings, count, preset_mask, first_step=first, total_steps=steps)
            specs.append(TransformerSpec(name=name, settings=settings, plan=plan, first_step=first))
        self.model.prepare(RequestSpec(
            transformers=tuple(specs), stats=self.stats,
            identify=lambda name, kwargs: Identity(self.work.branch, self.work.step), **more,
        ))
        return 1e3 * (time.perf_counter() - started)

    def run(self, knobs: dict[str, Any] | None, steps: int) -> tuple[float, int]:
        """One request: seconds and cached forwards."""
        self.begin(knobs, steps)
        seconds = self.work.loop(steps)
        self.model.prepare(None)
        branches = [b for t in self.stats.transformers.values() for b in t.branches.values()]
        return seconds, sum(len(b.cached) for b in branches)

    def warmup(self, knobs: dict[str, Any], steps: int = 2) -> float:
        """A warmup request as the host makes it: a few steps, and what the plugin runs beside them. Seconds."""
        self.begin(knobs, steps, warmup=Warmup(print, compiled=True).run)
        seconds = self.work.loop(steps)
        self.model.prepare(None)
        return seconds

    def close(self) -> None:
        """Give the transformers back."""
        for each in self.model.mounted.values():
            each.unmount()


class Stock:
    """SGLang's integration on the transformers of a Work, for one set of knobs."""

    def __init__(self, work: Work, knobs: dict[str, Any], steps: int):
        from cache_dit.caching.block_adapters.block_adapters import FakeDiffusionPipeline
        from sglang.multimodal_gen.runtime.cache import cache_dit_integration as host

        # cache-dit 1.5.1 keeps "is cached" on a class, and then mounts no second transformer in a process.
        if "_is_cached" in FakeDiffusionPipeline.__dict__:
            del FakeDiffusionPipeline._is_cached
        self.work, self.host = work, host
        own = {k: v for k, v in knobs.items() if not k.startswith("steps_computation")}
        masks, configs = {}, []
        for name, (_, count) in work.split(steps).items():
            preset = knobs.get("steps_computation_mask")
            masks[name] = preset_mask(preset, count) if preset else None
            configs.append(host.CacheDitConfig(
                enabled=True, num_inference_steps=count, steps_computation_mask=masks[name],
                steps_computation_policy=knobs.get("steps_computation_policy", "dynamic"), **own,
            ))
        modules = list(work.modules.values())
        if len(modules) == 1:
            host.enable_cache_on_transformer(modules[0], configs[0], has_separate_cfg=len(work.branches) > 1)
        else:
            host.enable_cache_on_dual_transformer(
                *modules, *configs, model_name="wan2.2", has_separate_cfg=len(work.branches) > 1
            )
        self.masks, self.policy = masks, knobs.get("steps_computation_policy", "dynamic")

    def run(self, knobs: dict[str, Any], steps: int) -> tuple[float, int]:
        """One request under the knobs that it was made with: seconds and cached forwards."""
        counts = [count for _, count in self.work.split(steps).values()]
        modules, masks = list(self.work.modules.values()), list(self.masks.values())
        if len(modules) == 1:
            self.host.refresh_context_on_transformer(
                modules[0], counts[0], steps_computation_mask=masks[0], steps_computation_policy=self.policy
            )
        else:
            self.host.refresh_context_on_dual_transformer(
                *modules, *counts, steps_computation_mask=masks[0], steps_computation_mask_2=masks[1],
                steps_computation_policy=self.policy,
            )
        seconds = self.work.loop(steps)
        managers = {id(m): m for m in (module._context_manager for module in modules)}
        # FLUX's two kinds of blocks have a context each, and share one decision where cache-dit joins them.
        found = [list(manager._cached_context_manager.values()) for manager in managers.values()]
        first = [each for contexts in found for each in contexts[: len(modules)]]
        return seconds, sum(len(c.cached_steps) + len(c.cfg_cached_steps) for c in first)

    def close(self) -> None:
        """Take it off again."""
        import cache_dit

        for module in self.work.modules.values():
            cache_dit.disable_cache(module)


def efficiency(work: Work, full_s: float, seconds: float, cached: int, steps: int, first: int = 1) -> float:
    """Share of the ideal: computed steps at full cost, cached ones at the cost of their first blocks."""
    forwards = steps * len(work.branches)
    each = full_s / forwards
    ideal = (forwards - cached) * each + cached * each * first / work.num_blocks
    return ideal / seconds


def speed(name: str, tiny: bool, only: str = "") -> list[dict[str, Any]]:
    """Uncached, stock and plugin, static and dynamic; the best of two rounds where a request takes seconds."""
    work = build(name, tiny)
    steps = work.steps
    work.warm()
    uncached = work.scale * min(work.loop(steps // work.scale) for _ in range(work.repeats))
    rounds = 2 if work.repeats > 2 else 1
    rows = [{"model": name, "variant": "uncached", "seconds": uncached, "forwards": steps * len(work.branches)}]
    kinds = {"static": {"steps_computation_mask": "medium", "steps_computation_policy": "static"}}
    kinds["dynamic"] = dict(DYNAMIC)
    if min(count for _, count in work.split(steps).values()) < 8:
        # Too few steps for a preset.
        kinds = {"dynamic": {**DYNAMIC, "max_warmup_steps": 1}}
    for label, knobs in kinds.items():
        found: dict[str, dict[str, Any]] = {}
        for variant in [*VARIANTS] * rounds if only in ("", label) else ():
            row = {"model": name, "variant": variant, "kind": label}
            try:
                row |= _speed_row(work, variant, {**knobs, **VARIANTS[variant]}, uncached, steps)
            except Exception as error:
                row["error"] = f"{error!r}"[:200]
            print(row, flush=True)
            found[variant] = min(row, found.get(variant, row), key=lambda each: each.get("seconds", float("inf")))
        rows += found.values()
    del work
    free()
    return rows


def _speed_row(work: Work, variant: str, knobs: dict[str, Any], uncached: float, steps: int) -> dict[str, Any]:
    side = _side(work, variant, knobs, steps)
    try:
        results = [side.run(knobs, steps) for _ in range(work.repeats)]
        seconds, cached = min(results)
        return {
            "seconds": seconds, "cached": cached, "speedup": uncached / seconds,
            "of_ideal": efficiency(work, uncached, seconds, cached, steps),
        }
    finally:
        side.close()


def memory(tiny: bool) -> list[dict[str, Any]]:
    """Peak during a request and what stays after it, over the uncached model; MiB."""
    rows = []
    for name in ("flux1024", "flux1024cfg"):
        work = build(name, tiny)
        work.loop(2)
        base, peak = _peak(functools.partial(work.loop, 2))
        rows.append({"model": name, "variant": "uncached", "peak": peak, "resting": 0.0})
        for label, extra in CALIBRATORS.items():
            knobs = {**DYNAMIC, "max_warmup_steps": 7, "max_continuous_cached_steps": 1, **extra}
            for variant in ("stock", "plugin"):
                row = {"model": name, "variant": variant, "kind": label}
                rows.append(row | _memory_row(work, variant, knobs, base))
                free()
                print(rows[-1], flush=True)
        del work
        free()
    return rows


def _memory_row(work: Work, variant: str, knobs: dict[str, Any], base: int) -> dict[str, Any]:
    side: Any = None
    try:
        side = _side(work, variant, knobs, 12)
        _, peak = _peak(lambda: side.run(knobs, 12))
        left = (torch.cuda.memory_allocated() - base) / 2**20 if torch.cuda.is_available() else 0.0
        return {"peak": peak, "resting": left}
    except Exception as error:
        return {"error": f"{error!r}"[:200]}
    finally:
        if side is not None:
            side.close()


def _side(work: Work, variant: str, knobs: dict[str, Any], steps: int) -> Any:
    return Stock(work, knobs, steps) if variant == "stock" else Plugin(work)


def _peak(run: Callable[[], Any]) -> tuple[int, float]:
    if not torch.cuda.is_available():
        run()
        return 0, 0.0
    sync()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    sync()
    return base, (torch.cuda.max_memory_allocated() - base) / 2**20


COMPILED = ("uncached, blocks", "plugin, blocks", "plugin, blocks, warmed", "stock, whole model")


def compiled(tiny: bool) -> list[dict[str, Any]]:
    """First request, later requests, switching knobs; each in a process with an empty cache of compiled code."""
    rows = []
    for what in COMPILED:
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {
                "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton",
            }
            size = ["--tiny"] if tiny else []
            command = [sys.executable, "-m", "benchmarks.gpu.single", "--compile-one", what, *size]
            try:
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True, timeout=200, check=True
                )
                rows.append(json.loads(done.stdout.splitlines()[-1]))
            except (subprocess.SubprocessError, ValueError) as error:
                rows.append({"what": what, "error": str(error)[:200] + str(getattr(error, "stderr", ""))[-200:]})
        print(rows[-1], flush=True)
    return rows


def compile_one(what: str, tiny: bool) -> dict[str, Any]:
    """One row of ``compiled``."""
    from torch._dynamo.utils import counters

    backend = {"backend": "eager"} if tiny else {}
    steps = 8
    knobs = {"steps_computation_mask": "medium", "steps_computation_policy": "static"}
    variant, part, *warmed = what.split(", ")
    work = build("flux1024", tiny)
    work.loop(2)
    side = _side(work, variant, knobs, steps) if variant != "uncached" else None
    (work.module.compile if part == "whole model" else work.module.compile_repeated_blocks)(**backend)
    run = (lambda: side.run(knobs, steps)[0]) if side is not None else (lambda: work.loop(steps))
    row: dict[str, Any] = {"what": what}
    if warmed:
        row["warmup_s"] = side.warmup(knobs)
    row |= {"first_s": run(), "later_s": min(run() for _ in range(3))}
    row["first_over_later"] = row["first_s"] / row["later_s"]
    graphs = counters["stats"]["unique_graphs"]
    row |= {"graphs": graphs, "graph_breaks": sum(counters["graph_break"].values())}
    if variant == "plugin":
        row |= _switches(side, knobs, steps)
    return row


def _switches(plugin: Plugin, knobs: dict[str, Any], steps: int) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    plugin.run(None, steps)
    plugin.run(dict(DYNAMIC), steps)
    graphs = counters["stats"]["unique_graphs"]
    mixed = [knobs, dict(DYNAMIC), None, *({**DYNAMIC, **each} for each in CALIBRATORS.values())] * 3
    switches = []
    for each in mixed[:20]:
        switches.append(plugin.begin(each, steps))
        plugin.work.loop(steps)
    return {
        "recompiled_in_20_requests": counters["stats"]["unique_graphs"] - graphs,
        "switch_ms": statistics.median(switches), "switch_ms_max": max(switches),
    }


def decision(tiny: bool) -> list[dict[str, Any]]:
    """Microseconds of one decision, its agreement with the eager sums, and waits for the device in a request."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for tokens, dim in ((4608, 3072), (7145, 3072), (32760, 5120), (75600, 5120)):
        shape = (1, 64, 64) if tiny else (1, tokens, dim)
        rows.append({"tokens": tokens, "dim": dim} | _decision_row(shape, device))
        print(rows[-1], flush=True)
    work = build("flux512", tiny)
    plugin = Plugin(work)
    for label, knobs in (
        ("static", {"steps_computation_mask": "medium", "steps_computation_policy": "static"}),
        ("dynamic", dict(DYNAMIC)),
    ):
        plugin.run(knobs, 12)
        plugin.begin(knobs, 12)
        waits = _waits(lambda: work.loop(12))
        measured = sum(
            len(b.residual_diffs) for t in plugin.stats.transformers.values() for b in t.branches.values()
        )
        rows.append({"what": f"waits for the device in 12 steps, {label}", "waits": waits, "measured": measured})
        plugin.model.prepare(None)
        print(rows[-1], flush=True)
    plugin.begin(None, 12)
    rows.append({"what": "waits for the device in 12 steps, uncached", "waits": _waits(lambda: work.loop(12))})
    plugin.close()
    return rows


def _decision_row(shape: tuple[int, ...], device: str) -> dict[str, float]:
    known = torch.randn(shape, device=device, dtype=torch.bfloat16)
    now = known + 0.1 * torch.randn_like(known)
    exact = float((now.double() - known.double()).abs().sum() / known.double().abs().sum())
    row = {"kernel_us": _micros(lambda: residual_sums(known, now).tolist())}
    ours = residual_sums(known, now).tolist()
    row["relative_error"] = abs(ours[0] / ours[1] - exact) / exact
    usable, similarity.usable = similarity.usable, lambda *tensors: False
    try:
        row["eager_us"] = _micros(lambda: residual_sums(known, now).tolist())
    finally:
        similarity.usable = usable
    # As CachedContextManager.similarity of cache-dit 1.5.1.
    row["stock_us"] = _micros(lambda: ((now - known).abs().mean() / known.abs().mean()).item())
    return row


def _waits(run: Callable[[], Any]) -> int:
    if not torch.cuda.is_available():
        run()
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


def _micros(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(30):
        sync()
        started = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - started))
    return statistics.median(times)


def free() -> None:
    """Give memory back between parts."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def show(results: dict[str, Any]) -> None:
    """Every row on a line, short."""
    for part, rows in results.items():
        for row in rows if isinstance(rows, list) else ():
            cells = [
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            ]
            print(f"{part:16} {'; '.join(cells)}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a run without a GPU")
    parser.add_argument("--only", default="decision,flux1024,flux512,qwen1328,memory,compile,wan480,wan720")
    parser.add_argument("--compile-one", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    launch.import_host()
    if options.compile_one:
        print(json.dumps(compile_one(options.compile_one, options.tiny)))
        return
    results: dict[str, Any] = {
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled(),
    }
    from benchmarks.gpu.works import works

    parts = {"memory": memory, "compile": compiled, "decision": decision, "works": works}
    for name in options.only.split(","):
        started = time.perf_counter()
        try:
            model, _, kind = name.partition(":")
            results[name] = parts[name](options.tiny) if name in parts else speed(model, options.tiny, kind)
        except Exception as error:
            results[name] = [{"error": f"{error!r}"[:400]}]
            free()
        print(f"-- {name}: {time.perf_counter() - started:.0f} s", flush=True)
        if out := os.environ.get("OUT"):
            Path(out, "single.json").write_text(json.dumps(results, indent=1))
    print(json.dumps(results))
    show(results)


if __name__ == "__main__":
    main()
