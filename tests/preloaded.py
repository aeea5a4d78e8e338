"""Imported once by the process from which hosts are forked: what the host imports from elsewhere.

Nothing of the host's runtime and nothing of the plugin: platforms, plugins and hooks come before those, in each process
anew.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys

MODULES = (
    "torch", "sglang", "sglang.cli.main", "sglang.srt.layers.quantization.base_config", "sglang.srt.managers.mm_utils",
    "sglang.srt.model_loader.checkpoint_quantization", "sglang.srt.layers.vocab_parallel_embedding",
    "sglang.srt.observability.trace", "cache_dit", "diffusers.image_processor", "fastapi", "uvicorn", "imageio",
    "tabulate", "runai_model_streamer", "pydantic.v1",
)
OWN = ("sglang.multimodal_gen.", "sglang_cachedit_plugin")

# Imports read the environment; this is ``host_environment``.
for name in [name for name in os.environ if name.startswith("SGLANG_")]:
    del os.environ[name]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
for each in MODULES:
    importlib.import_module(each)
early = [name for name in sys.modules if name.startswith(OWN)]
threads = os.listdir("/proc/self/task")
if early or len(threads) > 1:
    sys.exit(f"not to be forked: {len(threads)} threads, imported {early[:5]}")
# What is alive now stays alive: no collection of a child has to look through it.
gc.collect()
gc.freeze()
