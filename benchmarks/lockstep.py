"""``python -m benchmarks.lockstep``: the demo model under CFG parallelism on two processes, with and without lockstep.

Six prompts, 28 steps, guidance 3, threshold 0.1 without a cap on steps in a row. Prints the steps on which either
rank computes (the pair waits for it) and the relative error of the final latents against uncached.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from sglang_cachedit_plugin.demo import model_dir
from sglang_cachedit_plugin.demo.show import PROMPTS, STEPS
from tests.e2e.conftest import ROOT, free_ports, host_environment

KNOBS = {"residual_diff_threshold": 0.1, "max_warmup_steps": 4, "max_continuous_cached_steps": -1}
VARIANTS = {
    "uncached": {"enable_cache_dit": False},
    "lockstep off": {"enable_cache_dit": True, "cache_dit_params": KNOBS | {"lockstep": False}},
    "lockstep on": {"enable_cache_dit": True, "cache_dit_params": KNOBS | {"lockstep": True}},
}


def _request(prompt: str) -> dict:
    return {
        "prompt": prompt, "negative_prompt": "camera" if prompt == "pizza" else "pizza", "true_cfg_scale": 3.0,
        "width": 128, "height": 128, "num_inference_steps": STEPS, "seed": 1,
    }


def _computed(result: dict) -> set[int]:
    branches = result["report"]["transformers"]["transformer"]["branches"]
    return {step for branch in branches.values() for step in branch["computed"]}


def main() -> None:
    """Command line."""
    (port,) = free_ports(1)
    job = {
        "name": "demo", "ranks": 2,
        "server": {
            "model_path": str(model_dir()), "backend": "sglang", "enable_cfg_parallel": True, "master_port": port,
        },
        "requests": [_request(prompt) | variant for prompt in PROMPTS for variant in VARIANTS.values()],
    }
    with tempfile.TemporaryDirectory() as folder:
        jobs, out = Path(folder, "jobs.json"), Path(folder, "out.pt")
        jobs.write_text(json.dumps([job]))
        subprocess.run(
            [sys.executable, "-m", "tests.e2e.ranks_probe", str(jobs), str(out)], cwd=ROOT, env=host_environment(),
            check=True, capture_output=True,
        )
        ranks = torch.load(out)["demo"]
    for number, name in enumerate(VARIANTS):
        steps = errors = 0.0
        for first in range(0, len(job["requests"]), len(VARIANTS)):
            plain = ranks[0][first]["latents"].float()
            error = (ranks[0][first + number]["latents"].float() - plain).norm() / plain.norm()
            errors += float(error) / len(PROMPTS)
            if number:
                steps += len(set.union(*(_computed(rank[first + number]) for rank in ranks))) / len(PROMPTS)
        print(f"{name:<13} steps that either rank computes {steps or STEPS:5.1f} of {STEPS}, error {errors:.4f}")


if __name__ == "__main__":
    main()
