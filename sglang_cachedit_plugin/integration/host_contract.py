"""What the plugin calls in SGLang besides the hook points, and the versions that were tried.

Names are looked for in the host's source before anything is patched.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

NAMES: dict[str, tuple[str, ...]] = {
    "sglang.multimodal_gen.configs.sample.sampling_params": ("SamplingParams", "generate_request_id"),
    "sglang.multimodal_gen.configs.task_type": ("DataType",),
    "sglang.multimodal_gen.envs": ("environment_variables",),
    "sglang.multimodal_gen.runtime.cache.cache_dit_integration": ("CacheDitConfig",),
    "sglang.multimodal_gen.runtime.distributed.parallel_state": (
        "get_cfg_group", "get_classifier_free_guidance_world_size", "get_replica_group",
        "get_ring_parallel_world_size", "get_sp_group", "get_tp_group", "get_tp_world_size",
        "get_ulysses_parallel_world_size", "get_world_group", "model_parallel_is_initialized",
    ),
    "sglang.multimodal_gen.runtime.entrypoints.openai.image_api": ("router",),
    "sglang.multimodal_gen.runtime.entrypoints.openai.protocol": (
        "ImageGenerationsRequest", "ImageResponse", "VideoGenerationsRequest", "VideoListResponse", "VideoResponse",
    ),
    "sglang.multimodal_gen.runtime.entrypoints.openai.utils": (
        "add_common_data_to_response", "build_sampling_params", "get_sampling_request_extra_fields",
        "process_generation_batch", "resolve_sampling_params_cls", "temp_dir_if_disabled",
    ),
    "sglang.multimodal_gen.runtime.entrypoints.openai.video_api": ("router",),
    "sglang.multimodal_gen.runtime.entrypoints.utils": ("prepare_request",),
    "sglang.multimodal_gen.runtime.managers.forward_context": ("get_forward_context_or_none",),
    "sglang.multimodal_gen.runtime.observability.metrics": ("get_metrics",),
    "sglang.multimodal_gen.runtime.pipelines_core.schedule_batch": ("OutputBatch",),
    "sglang.multimodal_gen.runtime.pipelines_core.stages.denoising": ("DenoisingStage",),
    "sglang.multimodal_gen.runtime.platforms": ("current_platform",),
    "sglang.multimodal_gen.runtime.platforms.plugins": ("HookRegistry", "HookType"),
    "sglang.multimodal_gen.runtime.scheduler_client": ("async_scheduler_client",),
    "sglang.multimodal_gen.runtime.server_args": ("get_global_server_args",),
    "sglang.multimodal_gen.runtime.utils.hf_diffusers_utils": ("maybe_download_model_index",),
    "sglang.multimodal_gen.runtime.utils.logging_utils": ("init_logger",),
    "sglang.srt.observability.trace": ("extract_trace_headers",),
}
"""Module to names; a test derives them from this package's source."""


def module_file(root: Path, dotted: str) -> Path | None:
    """The file of a module under ``root``."""
    path = root.joinpath(*dotted.split("."))
    return next((each for each in (path.with_suffix(".py"), path / "__init__.py") if each.is_file()), None)


def mentions(path: Path, name: str) -> bool:
    """Whether the text of a module has ``name``: defined, imported or looked up lazily."""
    return re.search(rf"\b{re.escape(name)}\b", path.read_text(encoding="utf-8")) is not None


def missing(root: Path) -> list[str]:
    """Names that the host under ``root`` does not have."""
    problems = []
    for module, names in NAMES.items():
        path = module_file(root, module)
        if path is None:
            problems.append(f"{module}: no such module")
            continue
        problems += [f"{module}.{name}: not found" for name in names if not mentions(path, name)]
    return problems


TRIED = {
    "sglang": {"0.5.21": "read", "0.5.22": "read", "0.5.23": "run"},
    "cache-dit": {"1.5.0": "read", "1.5.1": "run", "1.5.2": "read", "1.5.3": "run"},
}
"""``run``: tests ran against it. ``read``: its source has all that the plugin needs; nothing was run."""


def version(distribution: str) -> str | None:
    """Installed version, None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def untried(installed: Callable[[str], str | None] = version) -> list[str]:
    """A line for each library whose installed version is not in the table."""
    found = {name: installed(name) for name in TRIED}
    return [
        f"{name} {own} was not tried, expected one of: {', '.join(TRIED[name])}"
        for name, own in found.items() if own is not None and own not in TRIED[name]
    ]
