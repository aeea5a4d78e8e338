"""Quality on the real host's native backend, side by side in one run: ``python -m benchmarks.native``.

The image demo model in SGLang's offline engine. Every setting draws the same prompts with the same seeds as the
uncached run. TeaCache and Spectrum are SGLang's own; the searched schedules are those of ``configs/tuned-demo.yaml``.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sglang_cachedit_plugin import demo
from sglang_cachedit_plugin.evaluation import quality
from sglang_cachedit_plugin.evaluation.host_process import HostPool
from sglang_cachedit_plugin.tune.candidates import spectrum_computed

FOLDER = Path(demo.__file__).parent
TUNED = Path(__file__).parents[1] / "configs" / "tuned-demo.yaml"
OFF = {"enable_cache_dit": False}
STATIC = {"scm_policy": "static"}


def cached(**settings: Any) -> dict[str, Any]:
    """Request fields of a cached request."""
    return {"enable_cache_dit": True, "cache_dit_params": settings}


def requests(steps: int) -> dict[str, dict[str, Any]]:
    """Request fields by name."""
    found = {
        "DBCache defaults, corrector off": cached(corrector=False),
        "DBCache defaults": cached(),
        "SCM medium static, corrector off": cached(scm_preset="medium", corrector=False, **STATIC),
        "SCM medium static": cached(scm_preset="medium", **STATIC),
        "TaylorSeer, corrector off": cached(enable_taylorseer=True, corrector=False),
        "TaylorSeer": cached(enable_taylorseer=True),
        **{f"tolerance {value}": cached(error_tolerance=value) for value in (0.003, 0.01, 0.02, 0.04, 0.08)},
        "TeaCache": {**OFF, "enable_teacache": True},
    }
    for flex in (0.25, 0.75):
        params = {"window_size": 2.0, "flex_window": flex, "warmup_steps": 5}
        found[f"Spectrum, flex {flex}"] = {**OFF, "enable_spectrum": True, "spectrum_params": params}
    for name, profile in yaml.safe_load(TUNED.read_text())["profiles"].items():
        rows = [row for row in profile["schedules"] if row["steps"] == steps]
        if rows:
            found[f"searched, {name}, corrector off"] = cached(**{**profile, "schedules": rows, "corrector": False})
            found[f"searched, {name}"] = cached(**{**profile, "schedules": rows})
    for fewer in (10, 14, 20, 24):
        found[f"fewer steps, {fewer}"] = {**OFF, "num_inference_steps": fewer}
    return found


def computed_steps(name: str, request: dict[str, Any], report: dict[str, Any], steps: int) -> float:
    """Computed steps of a served request; NaN where the host does not say."""
    if request.get("enable_cache_dit"):
        return report["computed_steps"]
    if "spectrum_params" in request:
        params = request["spectrum_params"]
        return spectrum_computed(steps, params["window_size"], params["flex_window"], params["warmup_steps"])
    return float("nan") if name == "TeaCache" else request.get("num_inference_steps", steps)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.native", description=__doc__)
    parser.add_argument("--prompts", type=int, default=12, help="held-out prompts, from the first")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--only", default="", help="only settings whose name matches this regular expression")
    args = parser.parse_args()
    wanted = {name: request for name, request in requests(args.steps).items() if re.search(args.only, name)}
    prompts = (FOLDER / "prompts/heldout.txt").read_text(encoding="utf-8").split("\n")[: args.prompts]
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        pool = HostPool({"model_path": str(FOLDER / "FLUX.1-dev"), "backend": "sglang"}, Path(folder), [{}])
        try:
            for seed, prompt in enumerate(prompts):
                frame = {
                    "prompt": prompt, "seed": seed, "width": 128, "height": 128, "num_inference_steps": args.steps
                }
                uncached, *others = pool.run_all([{**frame, **request} for request in (OFF, *wanted.values())])
                for (name, request), drawn in zip(wanted.items(), others, strict=True):
                    found.setdefault(name, []).append((
                        computed_steps(name, request, drawn.report, args.steps),
                        quality.psnr(uncached.picture, drawn.picture),
                    ))
        finally:
            pool.close()
    print(f"image, native, {args.steps} steps, {len(prompts)} pictures, CPU")
    print("| setting | computed | PSNR mean | p10 | worst |\n|---|---|---|---|---|")
    for name, rows in found.items():
        steps, values = (np.array(column) for column in zip(*rows, strict=True))
        low = np.percentile(values, 10)
        print(f"| {name} | {steps.mean():.1f} | {values.mean():.1f} | {low:.1f} | {values.min():.1f} |")


if __name__ == "__main__":
    main()
