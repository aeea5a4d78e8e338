"""The table of hook points: where this plugin meets SGLang, and what it expects to find there.

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

from .errors import HostContractError
from .integration import host_contract

_RUNTIME = "sglang.multimodal_gen.runtime"
_STAGES = f"{_RUNTIME}.pipelines_core.stages"
_EXECUTOR = f"{_RUNTIME}.pipelines_core.executors.pipeline_executor.PipelineExecutor"
_DENOISING = f"{_STAGES}.denoising.DenoisingStage"
_PROGRESSIVE = f"{_STAGES}.progressive_resolution"
_DIFFUSERS = f"{_RUNTIME}.pipelines.diffusers_pipeline"


@dataclass(frozen=True, kw_only=True)
class HookPoint:
    """One place of the host.

    Args:
        target: dotted path of the function or method that is hooked.
        parameters: names of its parameters; empty: any.
        older: the same in hosts before, whose calls the handler takes too.
        kind: the host's hook type: around, after or replace.
        handler: ``module:attribute`` in this package, imported on first call: torch and cache-dit are, at
            registration, not. A test holds its rooms: integration, serving, and this module.
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


def _of_mixin(name: str, parameters: tuple[str, ...], why: str, *, cls: str = _DENOISING, **more: Any) -> HookPoint:
    """A method of ``CacheDitDenoisingMixin`` in the place of the host's method of the same name."""
    handler = f"integration.native:CacheDitDenoisingMixin.{name}"
    return HookPoint(target=f"{cls}.{name}", parameters=parameters, kind="replace", handler=handler, why=why, **more)


HOOK_POINTS: tuple[HookPoint, ...] = (
    _of_mixin(
        "_maybe_enable_cache_dit", ("self", "num_inference_steps", "batch"),
        "native mount, refresh or bypass at the start of each request, before torch.compile; the stock "
        "method remounts when a knob changes, which cache-dit 1.5.1 does not survive",
    ),
    HookPoint(
        target=f"{_DENOISING}._maybe_torch_compile",
        parameters=("self", "module"),
        kind="around", handler="integration.native:load",
        why="mount before the host compiles, whether caching is on for all requests or only for some; compile the "
        "repeated blocks unless the deployer chose, which costs seconds where the whole model costs minutes",
    ),
    _of_mixin("_unmount_cache_dit", ("self",),
              "going uncached runs the original forward; nothing is torn down"),
    _of_mixin("_cache_dit_requested", ("self",),
              "the config file can enable caching too, not only the environment"),
    _of_mixin("_cache_dit_scm_masks", ("self", "primary_num_steps", "secondary_num_steps"),
              "schedules are made from the settings; what a subclass returns is the stage's own schedule"),
    _of_mixin("_build_cache_dit_config",
              ("self", "num_inference_steps", "steps_computation_mask", "scm_policy", "secondary"),
              "what a subclass makes of a config that nobody has touched is the stage's own settings"),
    HookPoint(
        target=f"{_RUNTIME}.pipelines_core.stages.base.PipelineStage.__call__",
        parameters=("self", "batch", "server_args"),
        kind="around", handler="integration.native:run_stage",
        why="end of a request, failed or not: free the buffers, write the report; some stages hold a "
        "DenoisingStage and call its forward themselves, so the end is that of whichever stage was called",
    ),
    HookPoint(
        target=f"{_EXECUTOR}.run_stage_with_context",
        parameters=("self", "stage", "payload", "server_args", "run_stage"),
        kind="around", handler="integration.native:run_payload",
        why="a stage that denoises a group of requests in one go is not called as a stage",
    ),
    HookPoint(
        target=f"{_EXECUTOR}._component_residency_request",
        parameters=("self", "stages", "payload", "server_args"),
        kind="around", handler="integration.native:run_request",
        why="all stages of a request: one with two denoising stages has one report and is counted once",
    ),
    HookPoint(
        target=f"{_STAGES}.model_specific_stages.cosmos3.Cosmos3DenoisingStage._predict_noise_cfg",
        parameters=(),
        kind="around", handler="integration.native_stages:guided",
        why="under CFG parallelism the steps without guidance run the conditional forward on every rank: they are told "
        "from those with guidance",
    ),
    _of_mixin(
        "_refresh_cache_dit_context", ("self", "n_remaining", "scm_preset", "ctx"),
        "the picture grows during denoising; the stock method refreshes what stock caching mounted",
        older=(("self", "n_remaining", "scm_preset"),), cls=f"{_PROGRESSIVE}.denoising.ProgressiveDenoisingStage",
    ),
    _of_mixin(
        "_refresh_cache_dit_context", ("self", "n_remaining", "scm_preset", "ctx"),
        "the same for Ideogram 4, which has a method of its own",
        older=(("self", "n_remaining", "scm_preset"),),
        cls=f"{_PROGRESSIVE}.ideogram.Ideogram4ProgressiveDenoisingStage",
    ),
    HookPoint(
        target=f"{_RUNTIME}.managers.gpu_worker.GPUWorker.init_device_and_model",
        parameters=("self",),
        kind="around", handler="hooks:start_worker",
        why="the config file holds before the model loads, as the host asks for it while stages are made; a model that "
        "cannot be cached, and a hook that another plugin took the place of, are named when it has loaded",
    ),
    HookPoint(
        target=f"{_RUNTIME}.distributed.cfg_policy.CFGBranch.configure_batch",
        parameters=("self", "batch"),
        kind="before", handler="integration.native_stages:branch_comes",
        why="the name of the branch whose forward comes next; the request itself carries only a boolean",
    ),
    HookPoint(
        target=f"{_DENOISING}._predict_noise_with_cfg",
        parameters=(
            "self", "current_model", "latent_model_input", "timestep", "batch", "timestep_index", "attn_metadata",
            "target_dtype", "current_guidance_scale", "cfg_policy", "cfg_gate_state", "server_args", "guidance",
            "latents",
        ),
        kind="around", handler="integration.native:predict_noise",
        why="under an error tolerance a cached step is the forecast of the guided output: no branch runs, nothing is "
        "combined, and any model is served whose stage makes its steps here",
    ),
    HookPoint(
        target=f"{_DENOISING}._maybe_get_bcg_runner",
        parameters=("self", "current_model"),
        kind="around", handler="integration.cuda_graphs:runner_of",
        why="static schedules of the whole output around breakable CUDA graphs: a computed step replays the host's "
        "graph, a cached one replays nothing; stock caches nothing where graphs are on",
    ),
    HookPoint(
        target=f"{_DIFFUSERS}.DiffusersPipeline._apply_cache_dit",
        parameters=("self", "pipe", "server_args"),
        kind="around", handler="integration.diffusers:load",
        why="diffusers mount at load, before torch.compile",
    ),
    HookPoint(
        target=f"{_DIFFUSERS}.DiffusersExecutionStage.forward",
        parameters=("self", "batch", "server_args"),
        kind="around", handler="integration.diffusers:execute",
        why="start and end of a request on the diffusers backend, which ignores request fields",
    ),
    HookPoint(
        target=f"{_RUNTIME}.distributed.parallel_state.initialize_model_parallel",
        parameters=(),
        kind="after", handler="integration.request:groups_ready",
        why="process groups of the ranks that must agree, where the host has none",
    ),
    HookPoint(
        target=f"{_RUNTIME}.utils.perf_logger.RequestMetrics.to_dict",
        parameters=("self",),
        kind="after", handler="integration.request:add_report",
        why="the report in the metrics of the offline engine's results",
    ),
    HookPoint(
        target=f"{_RUNTIME}.entrypoints.diffusion_generator.DiffGenerator._send_to_scheduler_and_wait_for_response",
        parameters=("self", "batch"),
        kind="after", handler="integration.request:answered",
        why="`sglang generate` and the offline engine show a table of steps and residual differences; what a worker "
        "refused is remembered",
    ),
    HookPoint(
        target=f"{_RUNTIME}.launch_server.launch_server",
        parameters=("server_args", "launch_http_server"),
        kind="before", handler="integration.startup:before_launch",
        why="--cache-dit-config is read in the launching process, before workers start and weights load, and handed on "
        "to them; the command line builds its server arguments before plugins load",
    ),
    HookPoint(
        target=f"{_RUNTIME}.launch_server.launch_disagg_role",
        parameters=("server_args",),
        kind="before", handler="integration.startup:before_launch",
        why="the same for a role that runs apart",
    ),
    HookPoint(
        target=f"{_RUNTIME}.launch_server.launch_pool_disagg_server",
        parameters=(),
        kind="before", handler="integration.startup:before_launch",
        why="the same for roles that one process launches",
    ),
    HookPoint(
        target=f"{_RUNTIME}.entrypoints.http_server.create_app",
        parameters=(),
        kind="around", handler="serving.app:create",
        why="the field cache_dit in the host's response models; /v1/cache_dit, /generate and the page /cache_dit",
    ),
    HookPoint(
        target=f"{_RUNTIME}.managers.scheduler.Scheduler._dispatch_single_request",
        parameters=("self", "req_or_group"),
        kind="around", handler="serving.channel:dispatch",
        why="changes of a running server reach every rank and replica in the queue of its requests, as the "
        "host's own LoRA messages do",
    ),
    HookPoint(
        target=f"{_RUNTIME}.entrypoints.openai.utils.build_sampling_params",
        parameters=(),
        kind="before", handler="serving.validation:check",
        why="a bad cache setting answers 400 before a worker hears of the request; the host would accept it "
        "and fail in the worker",
    ),
    HookPoint(
        target=f"{_RUNTIME}.entrypoints.openai.utils.add_common_data_to_response",
        parameters=("response", "request_id", "result"),
        kind="after", handler="serving.responses:add_report",
        why="the report in image, edit and video answers",
    ),
    HookPoint(
        target=f"{_RUNTIME}.disaggregation.orchestrator.DiffusionServer._handle_transfer_done",
        parameters=("self", "msg", "role"),
        kind="before", handler="serving.responses:remember",
        why="the report of a denoiser that runs apart: the decoder's result, which is answered, has no metrics",
    ),
    HookPoint(
        target=f"{_RUNTIME}.disaggregation.orchestrator._deserialize_request_metrics",
        parameters=("data",),
        kind="after", handler="serving.responses:restore",
        why="the report of a GLM-Image denoiser that runs apart",
    ),
    HookPoint(
        target=f"{_RUNTIME}.entrypoints.diffusion_generator.DiffGenerator.generate",
        parameters=("self", "sampling_params_kwargs", "external_trace_header"),
        kind="around", handler="integration.request:generate",
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


def check(point: HookPoint, root: Path) -> str | None:
    """What is wrong with a hook point in the host under ``root``, None where it is as expected."""
    source, name = _place(point, root)
    if source is None:
        return f"{name}: no such module"
    return difference(point, _functions(source).get(name))


def parameters_of(point: HookPoint, root: Path) -> tuple[str, ...] | None:
    """Parameters of a hook point in the host under ``root``, None where it is not there."""
    source, name = _place(point, root)
    return None if source is None else _functions(source).get(name)


def _place(point: HookPoint, root: Path) -> tuple[Path | None, str]:
    """The host's file of a hook point and the qualified name in it; None and the whole path where there is no file."""
    parts = point.target.split(".")
    for split in range(len(parts) - 1, 0, -1):
        source = root.joinpath(*parts[:split]).with_suffix(".py")
        if source.is_file():
            return source, ".".join(parts[split:])
    return None, point.target


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


def difference(point: HookPoint, found: tuple[str, ...] | None) -> str | None:
    """How the parameters found differ from those of a hook point, None where they do not."""
    if found is None:
        return f"{point.target}: not found"
    if point.parameters and found not in (point.parameters, *point.older):
        expected, actual = ", ".join(point.parameters), ", ".join(found)
        return f"{point.target}: expected ({expected}), found ({actual})"
    return None


def mismatches(root: Path) -> list[str]:
    """All hook points that are not as expected, and everything else that the host lacks."""
    found = [check(point, root) for point in HOOK_POINTS]
    return [problem for problem in found if problem is not None] + host_contract.missing(root)


def register(registry: Any, hook_type: Any) -> None:
    """Put every hook point's hook into the host's registry."""
    for point in HOOK_POINTS:
        registry.register(point.target, point.hook(), hook_type[point.kind.upper()])


def out_of_place(registry: Any) -> list[str]:
    """A line for each hook point that the host did not hook, or where another plugin's replacement stands in our place.

    The host only logs either, at the start.
    """
    given, patched = getattr(registry, "_hooks", None), getattr(registry, "_patched", None)
    if given is None or patched is None:
        return []
    found = []
    for point in HOOK_POINTS:
        replacing = [(hook, source) for kind, hook, source in given.get(point.target, ()) if kind.name == "REPLACE"]
        if point.target not in patched:
            found.append(f"{point.target}: the host could not hook it, see its log")
        elif point.kind == "replace" and replacing[-1][0].__module__ != __name__:
            name = getattr(replacing[-1][1], "plugin_name", None)
            found.append(f"{point.target}: the plugin {name!r} put its own in place of ours")
    return found


def start_worker(original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the load of a worker's model: settings first; afterwards what keeps the plugin from its work is named.

    Raises:
        MountError: with ``strict``, a model that cannot be cached.
    """
    from .integration import log, native, sglang_api, startup

    startup.ensure_file(worker.server_args)
    log.leave_out_refusals()
    result = original(worker, *args, **kwargs)
    if sglang_api.is_first_rank():
        for problem in out_of_place(sglang_api.hook_registry()[0]):
            sglang_api.logger().warning("cache-dit: %s", problem)
    native.check_worker(worker)
    return result
