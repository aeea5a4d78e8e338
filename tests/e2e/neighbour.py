"""A plugin of somebody else's: it hooks what we hook, changes what the model gets, and counts its calls.

``NEIGHBOUR_REPLACES`` makes it take the place of the method with which requests are cached.
"""

from __future__ import annotations

import os
from collections import Counter

PREFIX = "sglang.multimodal_gen.runtime"
STAGES = f"{PREFIX}.pipelines_core.stages"
CACHING = f"{STAGES}.denoising.DenoisingStage._maybe_enable_cache_dit"
calls: Counter = Counter()


def counted(name: str):
    """An AROUND hook that counts and hands on."""

    def around(original, *args, **kwargs):
        calls[name] += 1
        return original(*args, **kwargs)

    return around


def other_noise(original, stage, batch, server_args):
    """Around ``DenoisingStage.forward``: the model starts from other noise."""
    calls["forward"] += 1
    batch.latents = batch.latents.flip(-1)
    return original(stage, batch, server_args)


def other_prompt(original, stage, batch, server_args):
    """Around ``DiffusersExecutionStage.forward``: the pipeline gets another prompt."""
    calls["execute"] += 1
    batch.prompt = "green cat"
    return original(stage, batch, server_args)


def add_field(result, metrics):
    """After ``RequestMetrics.to_dict``."""
    return result | {"neighbour": "was here"}


def add_address(original, *args, **kwargs):
    """Around ``create_app``."""
    app = original(*args, **kwargs)
    app.add_api_route("/neighbour", lambda: "was here")
    return app


def no_caching(stage, num_inference_steps, batch):
    """In place of ``_maybe_enable_cache_dit``."""
    calls["caching"] += 1


def register() -> None:
    """The entry point."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    around = {
        f"{STAGES}.denoising.DenoisingStage.forward": other_noise,
        f"{STAGES}.base.PipelineStage.__call__": counted("stage"),
        f"{PREFIX}.pipelines.diffusers_pipeline.DiffusersExecutionStage.forward": other_prompt,
        f"{PREFIX}.entrypoints.openai.utils.build_sampling_params": counted("sampling"),
        f"{PREFIX}.entrypoints.http_server.create_app": add_address,
    }
    for target, hook in around.items():
        HookRegistry.register(target, hook, HookType.AROUND)
    HookRegistry.register(f"{PREFIX}.utils.perf_logger.RequestMetrics.to_dict", add_field, HookType.AFTER)
    if os.environ.get("NEIGHBOUR_REPLACES"):
        HookRegistry.register(CACHING, no_caching, HookType.REPLACE)
    else:
        HookRegistry.register(CACHING, counted("caching"), HookType.AROUND)
