"""Quality of caching settings on the demo models, side by side in one run: ``python -m benchmarks.quality --help``.

Every setting draws the same prompts with the same seeds as the uncached run, in a diffusers pipeline with the plugin's
cache in it. Printed are the mean computed steps, and the PSNR of the pictures against the uncached ones: mean, 10th
percentile and worst. Plain fewer steps run with the model's scheduler and with others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp

from sglang_cachedit_plugin import demo
from sglang_cachedit_plugin.cache import error_control
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.evaluation import quality
from sglang_cachedit_plugin.integration.diffusers import PipelineCache
from sglang_cachedit_plugin.integration.request import Session

FOLDER = Path(demo.__file__).parent
MODELS: Mapping[str, Mapping[str, Any]] = {
    "image": {"folder": "FLUX.1-dev", "prompts": "", "call": {"height": 128, "width": 128}},
    "image-cfg": {
        "folder": "FLUX.1-dev", "prompts": "",
        "call": {"height": 128, "width": 128, "true_cfg_scale": 3.0, "negative_prompt": "grey"},
    },
    "image-cfg-empty": {
        "folder": "FLUX.1-dev", "prompts": "",
        "call": {"height": 128, "width": 128, "true_cfg_scale": 3.0, "negative_prompt": ""},
    },
    "video": {
        "folder": "Wan2.2-T2V-A14B-Diffusers", "prompts": "video-",
        "call": {"height": 64, "width": 64, "num_frames": 9, "guidance_scale": 2.0},
    },
}
Settings = Mapping[str, Any]
STATIC = {"scm_policy": "static"}

CACHES: Mapping[str, Settings] = {
    "DBCache defaults": {},
    "DBCache R 0.12": {"residual_diff_threshold": 0.12},
    "DBCache R 0.06": {"residual_diff_threshold": 0.06},
    **{f"SCM {name} dynamic": {"scm_preset": name} for name in ("slow", "medium", "fast", "ultra")},
    **{f"SCM {name} static": {"scm_preset": name, **STATIC} for name in ("slow", "medium", "fast", "ultra")},
    "TaylorSeer": {"enable_taylorseer": True},
    "TaylorSeer, SCM medium static": {"enable_taylorseer": True, "scm_preset": "medium", **STATIC},
    "DMD": {"enable_dmd": True},
    "DMD, SCM medium static": {"enable_dmd": True, "scm_preset": "medium", **STATIC},
    **{
        f"output, SCM {name} static": {"forecast": "output", "scm_preset": name, **STATIC}
        for name in ("slow", "medium", "fast", "ultra")
    },
}
"""Every way of caching that the corrector meets."""


def corrector() -> dict[str, Settings]:
    """Each way of caching without and with the corrector."""
    return {
        f"{name} | {'on' if on else 'off'}": {**settings, "corrector": on}
        for name, settings in CACHES.items() for on in (False, True)
    }


def carry() -> dict[str, Settings]:
    """Order and carry of the corrector, for each kind of prediction."""
    kinds = {name: CACHES[name] for name in (
        "DBCache defaults", "SCM medium static", "TaylorSeer, SCM medium static", "DMD, SCM medium static",
        "output, SCM medium static", "output, SCM fast static",
    )}
    return {
        f"{name} | {label}": {**settings, **more}
        for name, settings in kinds.items()
        for label, more in [("off", {"corrector": False}), *(
            (f"order {order} carry {carry}", {"corrector_order": order, "corrector_carry": carry})
            for order in (1, 2) for carry in (0.0, 0.25, 0.5, 0.75, 1.0)
        )]
    }


def tolerance() -> dict[str, Settings]:
    """Error control at several tolerances; the built-in profiles without the corrector too."""
    found: dict[str, Settings] = {"DBCache defaults": {}}
    for value in (0.001, 0.003, 0.006, 0.01, 0.02, 0.04, 0.08):
        found[f"tolerance {value}"] = {"error_tolerance": value}
    for value in (0.003, 0.01, 0.08):
        found[f"tolerance {value}, corrector off"] = {"error_tolerance": value, "corrector": False}
    return found


def safeguards() -> dict[str, Settings]:
    """Error control with other constants, at several tolerances."""
    variants: Mapping[str, Mapping[str, Any]] = {
        "as built": {}, "beginning 3": {"BEGINNING": 3}, "beginning 6": {"BEGINNING": 6}, "longest 3": {"LONGEST": 3},
        "longest 6": {"LONGEST": 6}, "forgetting 0.5": {"FORGETTING": 0.5}, "forgetting 0.8": {"FORGETTING": 0.8},
        "late weight 1": {"LATE": 0.0}, "early weight 1": {"EARLY_WEIGHT": 1.0},
        "early weight 3": {"EARLY_WEIGHT": 3.0},
    }
    return {
        f"{label}, tolerance {tolerance}": {"error_tolerance": tolerance, "constants": constants}
        for label, constants in variants.items() for tolerance in (0.003, 0.01, 0.03)
    }


def choices() -> dict[str, Settings]:
    """Error control as built, and each choice made otherwise."""
    others: Mapping[str, Settings] = {
        "as built": {}, "order 1": {"corrector_order": 1}, "carry 0.5": {"corrector_carry": 0.5},
        "carry 1": {"corrector_carry": 1.0}, "corrector off": {"corrector": False},
        "beginning 3": {"constants": {"BEGINNING": 3}}, "longest 6": {"constants": {"LONGEST": 6}},
    }
    return {
        f"{name}, tolerance {tolerance}": {"error_tolerance": tolerance, **settings}
        for tolerance in (0.01, 0.04) for name, settings in others.items()
    }


SETS: Mapping[str, Callable[[], dict[str, Settings]]] = {
    "corrector": corrector, "carry": carry, "tolerance": tolerance, "safeguards": safeguards,
    "choices": choices,
}
FEWER: Mapping[str, str] = {
    "Euler": "FlowMatchEulerDiscreteScheduler", "UniPC": "UniPCMultistepScheduler",
    "DPM-Solver++": "DPMSolverMultistepScheduler",
}


BUILT = {
    name: getattr(error_control, name)
    for name in ("BEGINNING", "LONGEST", "FORGETTING", "RESTART", "EARLY", "EARLY_WEIGHT", "LATE")
}


class Painter:
    """One pipeline with the cache in it."""

    def __init__(self, model: str, device: str, dtype: torch.dtype, steps: int):
        import diffusers

        self._model, self._device, self.steps = MODELS[model], device, steps
        self.pipe = diffusers.DiffusionPipeline.from_pretrained(
            FOLDER / str(self._model["folder"]), torch_dtype=dtype
        ).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self._own_scheduler = self.pipe.scheduler
        self._cache = PipelineCache(self.pipe)

    def draw(self, prompt: str, seed: int, settings: Settings | None, steps: int | None = None) -> dict[str, Any]:
        """A picture or video, with steps and seconds; None: uncached."""
        settings = None if settings is None else dict(settings)
        constants = settings.pop("constants", {}) if settings else {}
        for name, value in {**BUILT, **constants}.items():
            setattr(error_control, name, value)
        session = Session("diffusers", Defaults().decide(settings is not None, settings))
        steps = steps or self.steps
        cached = contextlib.nullcontext() if settings is None else self._cache.request(session, steps)
        begun = time.perf_counter()
        with cached:
            output = self.pipe(
                prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), output_type="np",
                **self._model["call"],
            )
        seconds = time.perf_counter() - begun
        stats = session.close()
        picture = output.frames[0] if hasattr(output, "frames") else output.images[0]
        return {
            "picture": picture, "computed": stats.count("computed") if settings is not None else steps,
            "seconds": seconds, "reason": stats.why() if settings is not None else None,
        }

    @contextlib.contextmanager
    def scheduler(self, name: str) -> Iterator[None]:
        """Another scheduler of flow matching, on the shift of the model's own."""
        import diffusers

        own = self._own_scheduler
        if type(own).__name__ != FEWER[name]:
            more = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if name != "Euler" else {}
            shift = {"flow_shift" if more else "shift": own.config.get("shift") or own.config.get("flow_shift")}
            self.pipe.scheduler = getattr(diffusers, FEWER[name]).from_config(own.config, **more, **shift)
        try:
            yield
        finally:
            self.pipe.scheduler = own


def work(rank: int, jobs: Any, args: argparse.Namespace, out: Any) -> None:
    """One process: takes prompts until there are none left."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    painter = Painter(args.model, args.device, getattr(torch, args.dtype), args.steps)
    sets = {name: settings for each in args.sets for name, settings in SETS[each]().items()}
    sets = {name: settings for name, settings in sets.items() if re.search(args.only, name)}
    while (job := jobs.get()) is not None:
        seed, prompt = job
        uncached = painter.draw(prompt, seed, None)
        rows = [("uncached", painter.steps, 100.0, uncached["seconds"], None)]
        for name, settings in sets.items():
            drawn = painter.draw(prompt, seed, settings)
            rows.append((name, drawn["computed"], quality.psnr(uncached["picture"], drawn["picture"]),
                         drawn["seconds"], drawn["reason"]))
        for scheduler in args.fewer_with:
            for steps in args.fewer:
                with painter.scheduler(scheduler):
                    drawn = painter.draw(prompt, seed, None, steps)
                rows.append((f"fewer steps, {scheduler}, {steps}", steps,
                             quality.psnr(uncached["picture"], drawn["picture"]), drawn["seconds"], None))
        out.put((seed, rows))
    out.put(None)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="image")
    parser.add_argument("--sets", nargs="*", choices=SETS, default=["corrector"])
    parser.add_argument("--only", default="", help="only settings whose name matches this regular expression")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--split", choices=("heldout", "tune"), default="heldout", help="defaults are chosen on tune")
    parser.add_argument("--prompts", type=int, default=40, help="from the first")
    parser.add_argument("--seeds", type=int, default=1, help="pictures of each prompt")
    parser.add_argument("--fewer", type=int, nargs="*", default=[], help="plain runs with so many steps")
    parser.add_argument("--fewer-with", nargs="*", choices=FEWER, default=["Euler"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file of all rows")
    args = parser.parse_args()
    file = FOLDER / "prompts" / f"{MODELS[args.model]['prompts']}{args.split}.txt"
    prompts = [each for each in file.read_text(encoding="utf-8").split("\n") if each][: args.prompts] * args.seeds
    context = mp.get_context("spawn")
    jobs, out = context.Queue(), context.Queue()
    for job in [*enumerate(prompts), *[None] * args.workers]:
        jobs.put(job)
    processes = mp.spawn(work, (jobs, args, out), nprocs=args.workers, join=False)
    found: dict[str, list[tuple[Any, ...]]] = {}
    finished = 0
    while finished < args.workers:
        if not out.empty():
            result = out.get()
            if result is None:
                finished += 1
                continue
            for name, *row in result[1]:
                found.setdefault(name, []).append((result[0], *row))
        else:
            processes.join(timeout=0.2)
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{args.model}, {args.steps} steps, {len(found['uncached'])} pictures, {args.dtype}, {card}")
    print("| setting | computed | PSNR mean | p10 | worst |\n|---|---|---|---|---|")
    for name, rows in found.items():
        values = np.array([row[2] for row in rows])
        computed = np.mean([row[1] for row in rows])
        low = np.percentile(values, 10)
        print(f"| {name} | {computed:.1f} | {values.mean():.1f} | {low:.1f} | {values.min():.1f} |")
    for name, rows in found.items():
        if reasons := {row[4] for row in rows if row[4]}:
            print(f"{name}: {'; '.join(sorted(reasons)[:3])}")
    if args.out:
        args.out.write_text(json.dumps({"card": card, **{k: str(v) for k, v in vars(args).items()}, "rows": found}))


if __name__ == "__main__":
    main()
