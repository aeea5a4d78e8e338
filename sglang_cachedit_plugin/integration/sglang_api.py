"""What is asked of SGLang, but for the layout of its ranks: see ``ranks``.

Imports of sglang stand inside functions: the plugin is loaded in processes that must not import the runtime early.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..config.diffusers_sections import Machine
from ..report.stats import COND
from .host_contract import version as version


def hook_registry() -> tuple[Any, Any]:
    """The host's registry of hooks, and its types of hooks."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    return HookRegistry, HookType


def known_variables() -> Collection[str]:
    """Environment variables that the installed host reads."""
    from sglang.multimodal_gen import envs

    return envs.environment_variables.keys()


def machine() -> Machine:
    """Devices and libraries, without starting work on a device."""
    from sglang.multimodal_gen.runtime.platforms import current_platform

    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    return Machine(
        device=current_platform.device_type,
        capability=None if capability is None else (capability.major, capability.minor),
        cache_dit=version("cache-dit") or "",
    )


def transformer_classes(model_path: str) -> set[str]:
    """Classes of the transformers of a model in diffusers format; empty where its index is not on this machine."""
    index = Path(model_path) / "model_index.json"
    try:
        if not index.is_file():
            from huggingface_hub import try_to_load_from_cache

            # What it gives for a file that is not there is no path.
            index = Path(try_to_load_from_cache(model_path, "model_index.json"))
        components = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError):
        return set()
    found = (components.get(name) for name in ("transformer", "transformer_2")) if isinstance(components, dict) else ()
    return {each[1] for each in found if isinstance(each, list) and len(each) == 2 and isinstance(each[1], str)}


def explicit_flags(server_args: Any) -> dict[str, Any]:
    """Server arguments that were given, not worked out by the host."""
    names = (
        "ulysses_degree", "ring_degree", "sp_degree", "tp_size", "dp_size", "kv_gather_degree", "attention_backend",
    )
    return {
        name: value
        for name in names
        if server_args.is_arg_explicitly_set(name) and (value := getattr(server_args, name)) is not None
    }


def forward_context() -> Any:
    """The host's context of the forward under way, None outside its denoising loops."""
    from sglang.multimodal_gen.runtime.managers.forward_context import get_forward_context_or_none

    return get_forward_context_or_none()


def branch_name(own: str) -> str:
    """Our name of a branch that the host calls ``own``."""
    return {"conditional": COND, "unconditional": "uncond"}.get(own, own)


def runs_branches_apart() -> bool:
    """Whether CFG branches run on ranks of their own."""
    from sglang.multimodal_gen.runtime.distributed import parallel_state as state

    return state.model_parallel_is_initialized() and state.get_classifier_free_guidance_world_size() > 1


def overrides(stage: Any, method: str) -> bool:
    """Whether a denoising stage has a method in place of ``DenoisingStage``'s."""
    own = getattr(type(stage), method, None)
    if own is None:
        return False
    from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage

    return isinstance(stage, DenoisingStage) and own is not getattr(DenoisingStage, method)


def untouched_config(num_steps: int, mask: list[int] | None = None, policy: str = "dynamic") -> Any:
    """The host's ``CacheDitConfig`` with nothing but its defaults."""
    from sglang.multimodal_gen.runtime.cache.cache_dit_integration import CacheDitConfig

    return CacheDitConfig(
        enabled=True, num_inference_steps=num_steps, steps_computation_mask=mask, steps_computation_policy=policy
    )


def size_of(batch: Any) -> tuple[int, ...] | None:
    """Width and height of a request's pictures, and frames of a video; None where it does not say."""
    width, height, frames = (getattr(batch, name, None) for name in ("width", "height", "num_frames"))
    if not all(isinstance(each, int) and each > 0 for each in (width, height)):
        return None
    return (width, height, frames) if isinstance(frames, int) and frames > 1 else (width, height)


def timesteps_of(owner: Any) -> tuple[float, ...]:
    """Timesteps of a request, a context or a scheduler."""
    return tuple(float(each) for each in owner.timesteps.flatten().tolist())


def prefer_regional_compile(server_args: Any, module: Any) -> bool:
    """Whether to compile the repeated blocks of ``module`` only, because nobody chose otherwise.

    ``--regional-compile`` on the command line, with either value, is the deployer's choice.
    """
    if server_args.is_arg_explicitly_set("regional_compile"):
        return False
    conditions = getattr(module, "_compile_conditions", ())
    return any(name and any(holds(name, each) for holds in conditions) for name, each in module.named_modules())


def serves_nobody(batch: Any) -> bool:
    """Whether a request is the host's own: of its warmup, or the ordinary one that it adds for torch.compile."""
    return bool(batch.is_warmup or getattr(batch, "extra", {}).get("server_internal_prewarm"))


def logger() -> Any:
    """The host's logger, so that lines look like its own."""
    from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger

    return init_logger("sglang_cachedit_plugin")


async def tell_replicas(message: Any) -> list[Any]:
    """Answers of every data-parallel replica to a control message, in order; exceptions stand in their place.

    The host's own fan-out keeps the first replica's answer only, and knows its own message types only.
    """
    from sglang.multimodal_gen.runtime.scheduler_client import async_scheduler_client as client

    if client.context is None:
        raise ConnectionError("the server is not ready")

    async def one(endpoint: str) -> Any:
        return await client._forward_one(endpoint, message, None)

    return await asyncio.gather(*map(one, client.server_args.scheduler_endpoints), return_exceptions=True)


def answer(output: Any, error: str | None = None) -> Any:
    """A scheduler's answer to a control message."""
    from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch

    return OutputBatch(output=output, error=error)


def publishes_metrics() -> bool:
    """Whether this process speaks for its replica on ``/metrics``."""
    from sglang.multimodal_gen.runtime.observability.metrics import get_metrics

    return get_metrics() is not None


def rank() -> int:
    """This process's rank, 0 without ranks."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def is_first_rank() -> bool:
    """Whether this process speaks for all ranks in the log."""
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


def gather_replica(value: Any) -> list[Any]:
    """``value`` of every rank of this data-parallel replica, in order of ranks; all of them must call this."""
    import torch.distributed as dist
    from sglang.multimodal_gen.runtime.distributed import parallel_state as state

    if not dist.is_initialized() or (group := state.get_replica_group()).world_size == 1:
        return [value]
    everyone: list[Any] = [None] * group.world_size
    dist.all_gather_object(everyone, value, group=group.cpu_group)
    return everyone
