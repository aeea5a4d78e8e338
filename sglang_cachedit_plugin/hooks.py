"""The table of seams: where this plugin meets SGLang, and what it expects to find there.

Nothing here imports the host's runtime. Signatures are read from the host's source files, so a host that
has changed is noticed before anything is patched.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import host_names
from .errors import HostContractError

_RUNTIME = "sglang.multimodal_gen.runtime"
_STAGES = f"{_RUNTIME}.pipelines_core.stages"
_EXECUTOR = f"{_RUNTIME}.pipelines_core.executors.pipeline_executor.PipelineExecutor"
_DENOISING = f"{_STAGES}.denoising.DenoisingStage"
_PROGRESSIVE = f"{_STAGES}.progressive_resolution"
_DIFFUSERS = f"{_RUNTIME}.pipelines.diffusers_pipeline"


@dataclass(frozen=True, kw_only=True)
class Seam:
    """One place of the host.

    Args:
        target: dotted path of the function or method that is hooked.
        parameters: names of its parameters; empty: any.
        older: the same in hosts before, whose calls the handler takes too.
        kind: the host's hook type: around, after or replace.
        handler: ``module:attribute`` in this package, imported on first call.
        why: what the hook is for.
    """

    target: str
    parameters: tuple[str, ...]
    kind: str
    handler: str
    why: str
    older: tuple[tuple[str, ...], ...] = ()

    def hook(self) -> Callable[..., Any]:
        """The callable for the host's registry."""

        @functools.wraps(_call)
        def hook(*args: Any, **kwargs: Any) -> Any:
            return _call(self.handler, *args, **kwargs)

        return hook


def _call(handler: str, *args: Any, **kwargs: Any) -> Any:
    module, attribute = handler.split(":")
    return _resolve(module, attribute)(*args, **kwargs)


@functools.cache
def _resolve(module: str, attribute: str) -> Callable[..., Any]:
    found: Any = importlib.import_module(f".{module}", __package__)
    for name in attribute.split("."):
        found = getattr(found, name)
    return found


SEAMS: tuple[Seam, ...] = (
    Seam(
        target=f"{_DENOISING}._maybe_enable_cache_dit",
        parameters=("self", "num_inference_steps", "batch"),
        kind="replace",
        handler="denoising:CacheDitDenoisingMixin._maybe_enable_cache_dit",
        why="native mount, refresh or bypass at the start of each request, before torch.compile; the stock "
        "method remounts when a knob changes, which cache-dit 1.5.1 does not survive",
    ),
    Seam(
        target=f"{_DENOISING}._maybe_torch_compile",
        parameters=("self", "module"),
        kind="around",
        handler="denoising:compile_mounted",
        why="mount before the host compiles, whether caching is on for all requests or only for some; compile the "
        "repeated blocks unless the deployer chose, which costs seconds where the whole model costs minutes",
    ),
    Seam(
        target=f"{_DENOISING}._unmount_cache_dit",
        parameters=("self",),
        kind="replace",
        handler="denoising:CacheDitDenoisingMixin._unmount_cache_dit",
        why="going uncached runs the original forward; nothing is torn down",
    ),
    Seam(
        target=f"{_DENOISING}._cache_dit_requested",
        parameters=("self",),
        kind="replace",
        handler="denoising:CacheDitDenoisingMixin._cache_dit_requested",
        why="the config file can enable caching too, not only the environment",
    ),
    Seam(
        target=f"{_DENOISING}._cache_dit_scm_masks",
        parameters=("self", "primary_num_steps", "secondary_num_steps"),
        kind="replace",
        handler="denoising:CacheDitDenoisingMixin._cache_dit_scm_masks",
        why="schedules are made from the settings; what a subclass returns is the stage's own schedule",
    ),
    Seam(
        target=f"{_DENOISING}._build_cache_dit_config",
        parameters=("self", "num_inference_steps", "steps_computation_mask", "scm_policy", "secondary"),
        kind="replace",
        handler="denoising:CacheDitDenoisingMixin._build_cache_dit_config",
        why="what a subclass makes of a config that nobody has touched is the stage's own settings",
    ),
    Seam(
        target=f"{_RUNTIME}.pipelines_core.stages.base.PipelineStage.__call__",
        parameters=("self", "batch", "server_args"),
        kind="around",
        handler="denoising:run_stage",
        why="end of a request, failed or not: free the buffers, write the report; some stages hold a "
        "DenoisingStage and call its forward themselves, so the end is that of whichever stage was called",
    ),
    Seam(
        target=f"{_EXECUTOR}.run_stage_with_context",
        parameters=("self", "stage", "payload", "server_args", "run_stage"),
        kind="around",
        handler="denoising:run_payload",
        why="a stage that denoises a group of requests in one go is not called as a stage",
    ),
    Seam(
        target=f"{_EXECUTOR}._component_residency_request",
        parameters=("self", "stages", "payload", "server_args"),
        kind="around",
        handler="denoising:run_request",
        why="all stages of a request: one with two denoising stages has one report and is counted once",
    ),
    Seam(
        target=f"{_STAGES}.model_specific_stages.cosmos3.Cosmos3DenoisingStage._predict_noise_cfg",
        parameters=(),
        kind="around",
        handler="own_loops:guided",
        why="under CFG parallelism the steps without guidance run the conditional forward on every rank: they are told "
        "from those with guidance",
    ),
    Seam(
        target=f"{_PROGRESSIVE}.denoising.ProgressiveDenoisingStage._refresh_cache_dit_context",
        parameters=("self", "n_remaining", "scm_preset", "ctx"),
        older=(("self", "n_remaining", "scm_preset"),),
        kind="replace",
        handler="denoising:CacheDitDenoisingMixin._refresh_cache_dit_context",
        why="the picture grows during denoising; the stock method refreshes what stock caching mounted",
    ),
    Seam(
        target=f"{_PROGRESSIVE}.ideogram.Ideogram4ProgressiveDenoisingStage._refresh_cache_dit_context",
        parameters=("self", "n_remaining", "scm_preset", "ctx"),
        older=(("self", "n_remaining", "scm_preset"),),
        kind="replace",
        handler="denoising:CacheDitDenoisingMixin._refresh_cache_dit_context",
        why="the same for Ideogram 4, which has a method of its own",
    ),
    Seam(
        target=f"{_RUNTIME}.managers.gpu_worker.GPUWorker.init_device_and_model",
        parameters=("self",),
        kind="around",
        handler="plugin:start_worker",
        why="the config file holds before the model loads, as the host asks for it while stages are made; a model that "
        "cannot be cached, and a hook that another plugin took the place of, are named when it has loaded",
    ),
    Seam(
        target=f"{_RUNTIME}.distributed.cfg_policy.CFGBranch.configure_batch",
        parameters=("self", "batch"),
        kind="before",
        handler="host:branch_comes",
        why="the name of the branch whose forward comes next; the request itself carries only a boolean",
    ),
    Seam(
        target=f"{_DENOISING}._maybe_get_bcg_runner",
        parameters=("self", "current_model"),
        kind="around",
        handler="graphs:runner_of",
        why="static schedules of the whole output around breakable CUDA graphs: a computed step replays the host's "
        "graph, a cached one replays nothing; stock caches nothing where graphs are on",
    ),
    Seam(
        target=f"{_DIFFUSERS}.DiffusersPipeline._apply_cache_dit",
        parameters=("self", "pipe", "server_args"),
        kind="around",
        handler="diffusers_backend:load",
        why="diffusers mount at load, before torch.compile",
    ),
    Seam(
        target=f"{_DIFFUSERS}.DiffusersExecutionStage.forward",
        parameters=("self", "batch", "server_args"),
        kind="around",
        handler="diffusers_backend:execute",
        why="start and end of a request on the diffusers backend, which ignores request fields",
    ),
    Seam(
        target=f"{_RUNTIME}.distributed.parallel_state.initialize_model_parallel",
        parameters=(),
        kind="after",
        handler="host:groups_ready",
        why="process groups of the ranks that must agree, where the host has none",
    ),
    Seam(
        target=f"{_RUNTIME}.utils.perf_logger.RequestMetrics.to_dict",
        parameters=("self",),
        kind="after",
        handler="session:add_report",
        why="the report in the metrics of the offline engine's results",
    ),
    Seam(
        target=f"{_RUNTIME}.entrypoints.diffusion_generator.DiffGenerator._send_to_scheduler_and_wait_for_response",
        parameters=("self", "batch"),
        kind="after",
        handler="offline:answered",
        why="`sglang generate` and the offline engine show a table of steps and residual differences; what a worker "
        "refused is remembered",
    ),
    Seam(
        target=f"{_RUNTIME}.launch_server.launch_server",
        parameters=("server_args", "launch_http_server"),
        kind="before",
        handler="startup:before_launch",
        why="--cache-dit-config is read in the launching process, before workers start and weights load, and handed on "
        "to them; the command line builds its server arguments before plugins load",
    ),
    Seam(
        target=f"{_RUNTIME}.launch_server.launch_disagg_role",
        parameters=("server_args",),
        kind="before",
        handler="startup:before_launch",
        why="the same for a role that runs apart",
    ),
    Seam(
        target=f"{_RUNTIME}.launch_server.launch_pool_disagg_server",
        parameters=(),
        kind="before",
        handler="startup:before_launch",
        why="the same for roles that one process launches",
    ),
    Seam(
        target=f"{_RUNTIME}.entrypoints.http_server.create_app",
        parameters=(),
        kind="around",
        handler="serving.app:create",
        why="the field cache_dit in the host's response models; /v1/cache_dit, /generate and the page /cache_dit",
    ),
    Seam(
        target=f"{_RUNTIME}.managers.scheduler.Scheduler._dispatch_single_request",
        parameters=("self", "req_or_group"),
        kind="around",
        handler="serving.channel:dispatch",
        why="changes of a running server reach every rank and replica in the queue of its requests, as the "
        "host's own LoRA messages do",
    ),
    Seam(
        target=f"{_RUNTIME}.entrypoints.openai.utils.build_sampling_params",
        parameters=(),
        kind="before",
        handler="serving.requests:check",
        why="a bad cache setting answers 400 before a worker hears of the request; the host would accept it "
        "and fail in the worker",
    ),
    Seam(
        target=f"{_RUNTIME}.entrypoints.openai.utils.add_common_data_to_response",
        parameters=("response", "request_id", "result"),
        kind="after",
        handler="serving.answers:add_report",
        why="the report in image, edit and video answers",
    ),
    Seam(
        target=f"{_RUNTIME}.disaggregation.orchestrator.DiffusionServer._handle_transfer_done",
        parameters=("self", "msg", "role"),
        kind="before",
        handler="serving.answers:remember",
        why="the report of a denoiser that runs apart: the decoder's result, which is answered, has no metrics",
    ),
    Seam(
        target=f"{_RUNTIME}.disaggregation.orchestrator._deserialize_request_metrics",
        parameters=("data",),
        kind="after",
        handler="serving.answers:restore",
        why="the report of a GLM-Image denoiser that runs apart",
    ),
    Seam(
        target=f"{_RUNTIME}.entrypoints.diffusion_generator.DiffGenerator.generate",
        parameters=("self", "sampling_params_kwargs", "external_trace_header"),
        kind="around",
        handler="offline:generate",
        why="a bad cache setting raises in the offline engine's own process; the host would log the worker's error "
        "and return None",
    ),
)


def host_root() -> Path:
    """Folder that holds the installed ``sglang`` package."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise HostContractError("sglang is not installed")
    return Path(next(iter(spec.submodule_search_locations))).parent


def check(seam: Seam, root: Path) -> str | None:
    """What is wrong with a seam in the host under ``root``, None where it is as expected."""
    source, name = _place(seam, root)
    if source is None:
        return f"{name}: no such module"
    return difference(seam, _functions(source).get(name))


def parameters_of(seam: Seam, root: Path) -> tuple[str, ...] | None:
    """Parameters of a seam in the host under ``root``, None where it is not there."""
    source, name = _place(seam, root)
    return None if source is None else _functions(source).get(name)


def _place(seam: Seam, root: Path) -> tuple[Path | None, str]:
    """The host's file of a seam and the qualified name in it; None and the whole path where there is no file."""
    parts = seam.target.split(".")
    for split in range(len(parts) - 1, 0, -1):
        source = root.joinpath(*parts[:split]).with_suffix(".py")
        if source.is_file():
            return source, ".".join(parts[split:])
    return None, seam.target


@functools.lru_cache(maxsize=32)
def _functions(source: Path) -> Mapping[str, tuple[str, ...]]:
    """Qualified name of each function of a file, with its parameters."""
    found: dict[str, tuple[str, ...]] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                arguments = node.args
                names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
                found[prefix + node.name] = tuple(names)

    visit(ast.parse(source.read_text(encoding="utf-8")).body, "")
    return found


def difference(seam: Seam, found: tuple[str, ...] | None) -> str | None:
    """How the parameters found differ from those of a seam, None where they do not."""
    if found is None:
        return f"{seam.target}: not found"
    if seam.parameters and found not in (seam.parameters, *seam.older):
        expected, actual = ", ".join(seam.parameters), ", ".join(found)
        return f"{seam.target}: expected ({expected}), found ({actual})"
    return None


def mismatches(root: Path) -> list[str]:
    """All seams that are not as expected, and everything else that the host lacks."""
    return [problem for seam in SEAMS if (problem := check(seam, root)) is not None] + host_names.missing(root)


def register(registry: Any, hook_type: Any) -> None:
    """Put every seam's hook into the host's registry."""
    for seam in SEAMS:
        registry.register(seam.target, seam.hook(), hook_type[seam.kind.upper()])
