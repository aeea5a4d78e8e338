"""Requests through the offline engine: ``python -m tests.e2e.offline MODEL OUT.json BACKEND MASTER SCHEDULER``."""

from __future__ import annotations

import json
import sys

PICTURE = {
    "prompt": "red apple", "width": 64, "height": 64, "num_inference_steps": 12, "seed": 1, "save_output": False,
}
REQUESTS = {
    "bins of the environment": {"enable_cache_dit": True},
    "preset none": {"enable_cache_dit": True, "cache_dit_params": {"scm_preset": "none", "max_warmup_steps": 2}},
    "profile": {"enable_cache_dit": True, "cache_dit_params": {"profile": "fast"}},
    "off": {"enable_cache_dit": False},
    "bad": {"cache_dit_params": {"max_warmup_stepz": 1}},
    "refused": {"enable_cache_dit": True, "cache_dit_params": {"Fn_compute_blocks": 99, "strict": True}},
    "after the bad one": {"enable_cache_dit": True, "cache_dit_params": {"profile": "fast"}},
}


def main() -> None:
    """Write down each request's report, or the error that it raised."""
    from sglang.multimodal_gen import DiffGenerator

    model, out, backend, master, scheduler = sys.argv[1:]
    generator = DiffGenerator.from_pretrained(
        model_path=model, backend=backend, num_gpus=1, warmup_mode="off", attention_backend="torch_sdpa",
        master_port=int(master), scheduler_port=int(scheduler),
    )
    found = {}
    try:
        for name, fields in REQUESTS.items():
            try:
                found[name] = generator.generate(PICTURE | fields).metrics["cache_dit"]
            except ValueError as error:
                found[name] = f"{type(error).__name__}: {error}"
    finally:
        generator.shutdown()
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
