"""Native pipelines: the cache in SGLang's DenoisingStage."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..adapters import find_adapter
from ..cache.mount import ModelBackend
from ..cache.parallel import tell_parallel
from ..cache.runtime import Identity, Runtime
from ..cache.solvers import Solver
from ..config import effective
from ..config.sources import Source
from ..errors import MountError
from ..report.stats import RequestStats
from . import cuda_graphs, native_stages, sglang_api, stage_settings
from .native_stages import Identify, OwnLoop
from .session import REPORT, Session, attach, count, decide


class _Mounted:
    """What belongs to one stage: its transformers and their runtime."""

    def __init__(self, backend: ModelBackend):
        self.backend = backend
        self.runtime = Runtime(backend)


@dataclass(frozen=True)
class _Running:
    """A stage under way, its requests, and the size of the pictures that were asked of it."""

    stage: Any
    batches: Sequence[Any]
    size: tuple[int, ...] | None


@dataclass
class _Served:
    """What denoising stages have done so far for requests that they served together."""

    batches: Sequence[Any]
    stats: RequestStats
    failed: bool = False


@dataclass
class _Request:
    """One request, or one group, on its way through all stages; ``first`` is its first denoising stage."""

    first: Any = None
    served: list[_Served] = field(default_factory=list)


_stages: weakref.WeakKeyDictionary[Any, _Mounted] = weakref.WeakKeyDictionary()
_open: list[tuple[Any, Session]] = []
_kept: dict[Any, tuple[Session, Any]] = {}
_running: list[_Running] = []
_request: _Request | None = None


class CacheDitDenoisingMixin:
    """The Cache-DiT methods of the host's DenoisingStage, in terms of this plugin.

    Hooked onto ``DenoisingStage``; subclasses that override a method keep their own and reach these
    through ``super()``.
    """

    def _cache_dit_requested(self) -> bool:
        """Whether requests that say nothing are cached."""
        return effective.current().enabled

    def _maybe_enable_cache_dit(self, num_inference_steps: int | tuple[int, int], batch: Any) -> None:
        """Bring the transformers to what ``batch`` wants. Runs once a request, before torch.compile.

        Args:
            num_inference_steps: steps of the transformer, or of the high and the low noise expert.
            batch: the host's request.
        """
        if self in _kept:
            # Its run was given up: nobody has unmounted it.
            session, last = _kept.pop(self)
            _end(self, session, [last])
        joint = self._cache_dit_joint_cfg_decision()
        wanted = self._cache_dit_requested_for_batch(batch)
        session = _begin(self, batch, stage_settings.source(self, num_inference_steps, wanted=wanted))
        if session.decision.enabled and not wanted:
            session.refuse(stage_settings.refusal(self))
        elif session.decision.enabled and (reason := _declined(self, batch, session)):
            session.disable(reason)
        elif session.decision.enabled or self in _stages:
            loop = _loop(self)
            identify = loop.identify(batch) if loop is not None and loop.identify is not None else _identify
            _open_request(
                self, batch, self.server_args, session, identify, _steps(self, num_inference_steps), joint=joint,
                one_config=self._cache_dit_secondary_uses_primary_config(),
            )
        # Some stages keep what a cached forward needs only while this is set.
        self._cache_dit_enabled = session.stats.enabled

    def _unmount_cache_dit(self) -> None:
        """The host wants the original forward."""
        if self in _stages:
            _stages[self].runtime.prepare(None)
        self._cache_dit_enabled = False
        if self in _kept:
            # The step under way is the last of its run, or that of another one which takes the caching along.
            session, last = _kept.pop(self)
            batch = _running[-1].batches[0] if _running else last
            _end(self, session, [batch if native_stages.same_run(batch, last) else last])

    def _cache_dit_scm_masks(
        self, primary_num_steps: int, secondary_num_steps: int | None = None
    ) -> tuple[str, str, None, None]:
        """No schedule of the stage's own: schedules are made from the settings."""
        return "none", "dynamic", None, None

    def _build_cache_dit_config(
        self, num_inference_steps: int, steps_computation_mask: Any, scm_policy: str, secondary: bool = False
    ) -> Any:
        """Nothing of the stage's own: what a subclass puts in its place ranks under all that was set."""
        return sglang_api.untouched_config(num_inference_steps, steps_computation_mask, scm_policy)

    def _refresh_cache_dit_context(self, n_remaining: int, scm_preset: str | None, ctx: Any = None) -> None:
        """The picture has grown: nothing kept of the small one is of use. Steps keep their numbers.

        The host may have moved the next step back on the path.
        """
        positions = None if ctx is None else tuple(float(t) for t in ctx.timesteps.flatten().tolist())
        if self in _stages:
            for transformer in _stages[self].backend.mounted.values():
                transformer.forget(positions)
        for owner, session in _open:
            if owner is self and session.steps is not None:
                session.steps.grow()


def _loop(stage: Any) -> OwnLoop | None:
    """What is known of the stage under way, which may hold ``stage``, or of ``stage``."""
    return (native_stages.of(type(_running[-1].stage)) if _running else None) or native_stages.of(type(stage))


def _begin(stage: Any, batch: Any, own: Source | None = None) -> Session:
    """Decide on a request; ``own``: what the stage wants by itself."""
    params = batch.sampling_params
    decision = decide(params.enable_cache_dit, params.cache_dit_params, own)
    outermost = _running[0].stage if _running else stage
    if _request is not None and _request.first is None:
        _request.first = outermost
    session = Session("native", decision, further=_request is not None and _request.first is not outermost)
    _open.append((stage, session))
    sglang_api.forget_branch()
    if session.decision.enabled and (sections := effective.current().file.passed_on):
        session.stats.note(f"only the diffusers backend reads {', '.join(sections)} of the config file")
    return session


def _outside_graphs(session: Session, batch: Any) -> str | None:
    """Why a request cannot be cached around the host's CUDA graphs."""
    if batch.is_warmup:
        return cuda_graphs.CAPTURING
    resolved = session.decision.resolved
    return None if cuda_graphs.fits(resolved.primary) and cuda_graphs.fits(resolved.secondary) else cuda_graphs.REFUSED


def _declined(stage: Any, batch: Any, session: Session) -> str | None:
    """Why a request of a stage that asks for caching runs uncached all the same."""
    if stage.server_args.enable_breakable_cuda_graph and (reason := _outside_graphs(session, batch)):
        return reason
    for switch, name in (("enable_teacache", "TeaCache"), ("enable_spectrum", "Spectrum")):
        if getattr(batch, switch, False):
            return f"{name} is on: the host leaves out steps itself"
    return None


def _open_request(
    stage: Any, batch: Any, server_args: Any, session: Session, identify: Identify,
    steps: dict[str, tuple[int, int]], *, joint: bool = False, one_config: bool = False, exact: bool = True,
) -> None:
    # The host's own requests may take other steps than the one that they copy, a further stage takes its own.
    if exact and not sglang_api.serves_nobody(batch) and REPORT not in getattr(batch, "extra", {}):
        session.check_masks(steps, one_config)
    mounted = _mounted(stage)
    with_graphs = bool(server_args.enable_breakable_cuda_graph)
    mounted.backend.identify = cuda_graphs.nobody if with_graphs else identify
    try:
        mounted.backend.groups = sglang_api.groups(
            [each.stage for each in _running] or [stage], batch, modules=mounted.backend.modules.values(), joint=joint,
            patch_size=getattr(stage.transformer, "patch_size", None),
        )
    except MountError as error:
        session.refuse(str(error))
        return
    # Cosmos 3 keeps its scheduler itself.
    scheduler = getattr(batch, "scheduler", None)
    scheduler = getattr(stage, "scheduler", None) if scheduler is None else scheduler
    solver = None if scheduler is None else Solver(scheduler, scheduler.step)
    controlled = session.decision.resolved.primary.error_tolerance is not None
    if controlled and solver is not None and _makes_base_steps(stage):
        session.open_for_stage(mounted.runtime, mounted.backend, steps, solver)
        session.hook_scheduler()
        return
    session.open(
        mounted.runtime, mounted.backend, steps, _positions(batch, steps),
        # A stage that grows the picture starts small; schedules are tuned for the size that was asked for.
        size=_running[-1].size if _running else sglang_api.size_of(batch), one_config=one_config, solver=solver,
    )
    # A stage may hold another one that asks for it.
    reasons = (native_stages.uncorrected(type(each)) for each in (*(running.stage for running in _running), stage))
    if session.steps is not None and (reason := next(filter(None, reasons), None)):
        session.steps.unseen = reason
    session.hook_scheduler()
    if with_graphs and session.stats.enabled:
        cuda_graphs.serve(mounted.backend.mounted.values(), identify)
    elif batch.is_warmup:
        session.rehearse(compiled=bool(server_args.enable_torch_compile))


def _makes_base_steps(stage: Any) -> bool:
    """Whether all steps of a stage go through ``DenoisingStage._predict_noise_with_cfg``."""
    # Stages that grow the picture have a loop of their own over the base's steps.
    own_loop = sglang_api.overrides(stage, "forward") and not hasattr(stage, "_run_stage_steps")
    methods = ("_denoise", "_run_denoising_loop", "_run_denoising_step", "_predict_noise_with_cfg")
    return not own_loop and _loop(stage) is None and not any(sglang_api.overrides(stage, each) for each in methods)


def predict_noise(original: Callable[..., Any], stage: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``DenoisingStage._predict_noise_with_cfg``: a step that an error tolerance leaves out runs no branch."""
    session = next((session for owner, session in reversed(_open) if owner is stage), None)
    if session is None or session.steps is None or not session.stage_decides:
        return original(stage, *args, **kwargs)
    second = kwargs["current_model"] is getattr(stage, "transformer_2", None)
    branches = [sglang_api.branch_name(branch.name) for branch in kwargs["cfg_policy"].branches]
    return session.steps.predict(
        "transformer_2" if second else "transformer", branches, lambda: original(stage, *args, **kwargs)
    )


def _enter_own_loop(stage: Any, batch: Any, server_args: Any, loop: OwnLoop) -> None:
    """Open the request of a stage that never asks; raises RefusedError for one that is declined and ``strict``."""
    session = _begin(stage, batch)
    decision = session.decision
    if not decision.enabled and stage not in _stages:
        return
    reason = loop.refused
    if decision.enabled and server_args.enable_breakable_cuda_graph:
        reason = reason or _outside_graphs(session, batch)
    if not reason and getattr(stage, "transformer", None) is None:
        reason = "its transformer is not loaded yet"
    if not reason:
        steps = {"transformer": (0, native_stages.num_steps(batch))}
        known = getattr(batch, "timesteps", None) is not None
        _open_request(stage, batch, server_args, session, loop.identify(batch), steps, exact=known)
    elif decision.enabled:
        session.refuse(f"{type(stage).__name__}: {reason}")


def check_worker(worker: Any) -> None:
    """After a worker has loaded its model: one line for each transformer that will not be cached.

    Raises:
        MountError: with ``strict``, where caching is on for all requests.
    """
    if not effective.current().enabled:
        return
    settings = effective.current().decide(None, None).resolved.primary
    for name, module in getattr(worker.pipeline, "modules", {}).items():
        row = find_adapter(type(module)) if isinstance(module, nn.Module) else None
        reason = "" if row is None else row.refused
        if row is not None and row.output_only and settings.forecast != "output" and settings.error_tolerance is None:
            reason = f"{row.no_blocks}; error_tolerance or forecast: output can be used"
        if not reason:
            continue
        if settings.strict:
            raise MountError(f"{type(module).__name__}: {reason}")
        if sglang_api.is_first_rank():
            sglang_api.logger().warning("cache-dit: off: %s (%s): %s", name, type(module).__name__, reason)


def _mounted(stage: Any) -> _Mounted:
    modules = {"transformer": stage.transformer, "transformer_2": getattr(stage, "transformer_2", None)}
    modules = {name: module for name, module in modules.items() if module is not None}
    mounted = _stages.get(stage)
    if mounted is None or mounted.backend.modules != modules:
        # The host may load a transformer anew (low-memory modes): what was mounted went with it.
        mounted = _stages[stage] = _Mounted(ModelBackend(modules, _identify))
        for module in modules.values():
            tell_parallel(module, sglang_api.layout())
    return mounted


def compile_mounted(original: Callable[..., Any], stage: Any, module: Any) -> None:
    """Around ``DenoisingStage._maybe_torch_compile``: mount what will be compiled.

    A forward that is replaced after it was compiled is compiled again. The host holds compilation back
    until stock caching is mounted; here it is mounted already.
    """
    server_args = stage.server_args
    if not server_args.enable_torch_compile or server_args.enable_breakable_cuda_graph:
        return original(stage, module)
    try:
        _mounted(stage).runtime.mount()
    except MountError as error:
        if effective.current().decide(None, None).resolved.primary.strict:
            raise
        sglang_api.logger().warning("cache-dit: off: %s", error)
    in_use = effective.current().enabled or server_args.cache_dit_config
    if in_use and sglang_api.prefer_regional_compile(server_args, module):
        server_args.regional_compile = True
    enabled, stage._cache_dit_enabled = stage._cache_dit_enabled, True
    try:
        return original(stage, module)
    finally:
        stage._cache_dit_enabled = enabled


def _identify(name: str, kwargs: Mapping[str, Any]) -> Identity | None:
    return sglang_api.forward_identity()


def _steps(stage: Any, num_inference_steps: int | tuple[int, int]) -> dict[str, tuple[int, int]]:
    primary, secondary = stage._cache_dit_step_counts(num_inference_steps)
    steps = {"transformer": (0, primary)}
    if stage.transformer_2 is not None:
        first = primary if isinstance(num_inference_steps, tuple) else 0
        steps["transformer_2"] = (first, secondary)
    return steps


def _positions(batch: Any, steps: Mapping[str, tuple[int, int]]) -> tuple[float, ...] | None:
    timesteps = getattr(batch, "timesteps", None)
    total = max(first + count for first, count in steps.values())
    # A request of one step says the timestep of that one.
    if timesteps is None or timesteps.numel() < total:
        return None
    return tuple(float(t) for t in timesteps.flatten().tolist())


def run_stage(original: Callable[..., Any], stage: Any, batch: Any, server_args: Any) -> Any:
    """Around every stage: whatever happened in it, a request opened in it ends with it."""
    before = len(_open)
    with _under_way(stage, [batch]):
        loop = native_stages.of(type(stage))
        # Action models are served requests of another kind, which cannot ask for anything.
        if loop is not None and not loop.asks and getattr(batch, "sampling_params", None) is not None:
            _enter_own_loop(stage, batch, server_args, loop)
        result = original(stage, batch, server_args)
        for _, session in _open[before:]:
            if session.recording is not None:
                session.recording.latents(getattr(result, "latents", None))
        if len(_open) == before and sglang_api.overrides(stage, "_maybe_enable_cache_dit"):
            # It decided before it came to the method that it stands in place of.
            session = _begin(stage, batch)
            if session.decision.enabled:
                session.disable(stage_settings.refusal(stage))
        return result


def run_payload(
    original: Callable[..., Any], executor: Any, stage: Any, payload: Any, server_args: Any, run: Callable[..., Any]
) -> Any:
    """Around what the executor does with a stage: some denoise a group in one go, and are not called as stages."""
    if not isinstance(payload, list) or not payload:
        return original(executor, stage, payload, server_args, run)
    with _under_way(stage, payload):
        return original(executor, stage, payload, server_args, run)


@contextmanager
def run_request(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
    """Around all stages of a request or group: it is counted once, however many of them denoise."""
    global _request
    outer, _request = _request, _Request()
    try:
        with original(*args, **kwargs):
            yield
    finally:
        ended, _request = _request, outer
        for served in ended.served:
            count(served.batches, served.stats, sglang_api.logger().info, failed=served.failed)


@contextmanager
def _under_way(stage: Any, batches: Sequence[Any]) -> Iterator[None]:
    before, failed = len(_open), True
    _running.append(_Running(stage, batches, sglang_api.size_of(batches[0])))
    try:
        yield
        failed = False
    finally:
        _running.pop()
        ended, _open[before:] = _open[before:], []
        loop = native_stages.of(type(stage))
        with ExitStack() as ends:
            # Each is ended, whatever the end of another one raises.
            if loop is not None and loop.one_step:
                ended = _keep(ended, batches[0], failed)
            for owner, session in ended:
                ends.callback(_end, owner, session, batches, failed)


def _keep(opened: list[tuple[Any, Session]], batch: Any, failed: bool) -> list[tuple[Any, Session]]:
    """Of the sessions of a stage whose requests are single steps, those that end now; the others go on."""
    if failed:
        kept = [(owner, session) for owner, (session, _) in _kept.items()]
        _kept.clear()
        return [*opened, *kept]
    _kept.update({owner: (session, batch) for owner, session in opened if owner._cache_dit_enabled})
    for owner, (session, last) in _kept.items():
        if native_stages.same_run(last, batch):
            _kept[owner] = session, batch
            attach(batch, session.stats)
    return [each for each in opened if not each[0]._cache_dit_enabled]


def _end(owner: Any, session: Session, batches: Sequence[Any], failed: bool = False) -> None:
    if owner in _stages:
        cuda_graphs.stop(_stages[owner].backend.modules.values())
    module = getattr(owner, "transformer", None)
    device = next((p.device for p in module.parameters()), None) if module is not None else None
    stats = session.close(device)
    request = _request or _Request()
    served = next((each for each in request.served if each.batches[0] is batches[0]), None)
    if served is None:
        served = _Served(batches, stats)
        request.served.append(served)
    else:
        served.stats.add_stage(type(owner).__name__, stats)
    served.failed = served.failed or failed
    for batch in batches:
        attach(batch, served.stats)
    if _request is None:
        count(batches, stats, sglang_api.logger().info, failed=failed)
