"""Native pipelines: the cache in SGLang's DenoisingStage.

A request comes through ``run_request``, ``run_payload`` and ``run_stage``. Its stage asks for caching
(``CacheDitDenoisingMixin._maybe_enable_cache_dit``), or the plugin asks for it (``native_stages``); both open it in
``_open``. Whatever began in a stage ends with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from ..cache.block_lists import why_not_cached
from ..cache.cached_model import CachedModel
from ..cache.parallel import tell_parallel
from ..cache.solvers import Solver
from ..config import effective
from ..errors import MountError, Reason, reason_of
from . import cuda_graphs, native_stages, ranks, request, sglang_api
from .native_stages import OwnLoop
from .request import REPORT, WORKER, Facts, Session


class CacheDitDenoisingMixin:
    """The Cache-DiT methods of the host's DenoisingStage, in terms of this plugin.

    The hook table puts each in the place of the method of the same name on ``DenoisingStage``; subclasses that
    override one keep their own and reach these through ``super()``.
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
        if self in WORKER.kept:
            # Its run was given up: nobody has unmounted it.
            session = WORKER.kept.pop(self)
            request.end(session, [session.batch])
        joint = self._cache_dit_joint_cfg_decision()
        wanted = self._cache_dit_requested_for_batch(batch)
        session = _begin(self, batch, native_stages.source(self, num_inference_steps, wanted=wanted))
        if session.decision.enabled and not wanted:
            session.refuse(native_stages.refusal(self))
        elif session.decision.enabled and (reason := _declined(self, batch, session)):
            session.disable(reason)
        elif session.decision.enabled or self in WORKER.models:
            _open(
                self, batch, self.server_args, session, _loop(self), _steps(self, num_inference_steps), joint=joint,
                one_config=self._cache_dit_secondary_uses_primary_config(),
            )
        # Some stages keep what a cached forward needs only while this is set.
        self._cache_dit_enabled = session.stats.enabled

    def _unmount_cache_dit(self) -> None:
        """The host wants the original forward."""
        if self in WORKER.models:
            WORKER.models[self].prepare(None)
        self._cache_dit_enabled = False
        if self in WORKER.kept:
            # The step under way is the last of its run, or that of another one which takes the caching along.
            session, stages = WORKER.kept.pop(self), WORKER.active.stages
            batch = stages[-1].batches[0] if stages else session.batch
            request.end(session, [batch if native_stages.same_run(batch, session.batch) else session.batch])

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
        """The picture has grown; the host may have moved the next step back on the path."""
        timesteps = None if ctx is None else sglang_api.timesteps_of(ctx)
        for session in WORKER.active.sessions:
            if session.owner is self:
                session.grow(timesteps)


def load(original: Callable[..., Any], stage: Any, module: Any) -> None:
    """Around ``DenoisingStage._maybe_torch_compile``: what happens to the transformers before any forward, in order."""
    server_args = stage.server_args
    if not server_args.enable_torch_compile or server_args.enable_breakable_cuda_graph:
        # Mounted by the first request that wants it: nothing that comes later depends on it.
        return original(stage, module)
    # 1. Mount: a forward that is replaced after it was compiled is compiled again.
    try:
        _model(stage).mount()
    except MountError as error:
        if effective.current().decide(None, None).resolved.primary.strict:
            raise
        reason = reason_of(error, "blocks")
        sglang_api.logger().warning("cache-dit: off [%s]: %s", reason.code, reason)
    # 2. Groups are bound with each request: the host lays the same ranks out by the stages under way.
    # 3. The config file's sections are for diffusers alone: the host has split the model itself.
    # 4. Compile: the repeated blocks, unless the deployer chose. The host holds compilation back until stock caching
    # is mounted; here it is mounted already.
    in_use = effective.current().enabled or server_args.cache_dit_config
    if in_use and sglang_api.prefer_regional_compile(server_args, module):
        server_args.regional_compile = True
    enabled, stage._cache_dit_enabled = stage._cache_dit_enabled, True
    try:
        return original(stage, module)
    finally:
        stage._cache_dit_enabled = enabled


def _model(stage: Any) -> CachedModel:
    modules = {name: getattr(stage, name, None) for name in ("transformer", "transformer_2")}
    modules = {name: module for name, module in modules.items() if module is not None}
    model = WORKER.models.get(stage)
    if model is None or model.modules != modules:
        # The host may load a transformer anew (low-memory modes): what was mounted went with it.
        model = WORKER.models[stage] = CachedModel(modules)
        for module in modules.values():
            tell_parallel(module, ranks.layout())
    return model


def _loop(stage: Any) -> OwnLoop:
    """What is known of the stage under way, which may hold ``stage``, or of ``stage``."""
    stages = WORKER.active.stages
    return (native_stages.of(type(stages[-1].stage)) if stages else None) or native_stages.of(type(stage)) or _BASE


_BASE = OwnLoop(asks=True)
"""The loop of ``DenoisingStage`` itself."""


def _begin(stage: Any, batch: Any, own: Any = None) -> Session:
    session = request.begin("native", stage, batch, own)
    if session.decision.enabled and (sections := effective.current().file.passed_on):
        why = f"only the diffusers backend reads {', '.join(sections)} of the config file"
        session.stats.note(Reason("sections", why))
    return session


def _declined(stage: Any, batch: Any, session: Session) -> str | None:
    """Why a request that the stage wants cached runs uncached all the same."""
    if stage.server_args.enable_breakable_cuda_graph and (reason := cuda_graphs.refusal(session.decision, batch)):
        return reason
    for switch, name in (("enable_teacache", "TeaCache"), ("enable_spectrum", "Spectrum")):
        if getattr(batch, switch, False):
            return Reason("other_cache", f"{name} is on: the host leaves out steps itself")
    return None


def _open(
    stage: Any, batch: Any, server_args: Any, session: Session, loop: OwnLoop, steps: dict[str, tuple[int, int]], *,
    joint: bool = False, one_config: bool = False, exact: bool = True,
) -> None:
    """Serve a request: take its model, bind the ranks, and make the one transition."""
    model, stages = _model(stage), WORKER.active.stages
    try:
        groups = ranks.groups(
            WORKER.slices, [each.stage for each in stages] or [stage], batch, joint=joint,
            modules=model.modules.values(), patch_size=getattr(stage.transformer, "patch_size", None),
        )
    except MountError as error:
        session.refuse(reason_of(error, "ranks"))
        return
    # Cosmos 3 keeps its scheduler itself.
    scheduler = getattr(batch, "scheduler", None)
    scheduler = getattr(stage, "scheduler", None) if scheduler is None else scheduler
    # A stage may hold another one that asks for it.
    unseen = (native_stages.uncorrected(type(each)) for each in (*(running.stage for running in stages), stage))
    around = bool(server_args.enable_breakable_cuda_graph)
    # The host's own requests may take other steps than the one that they copy, a further stage takes its own.
    exact = exact and not sglang_api.serves_nobody(batch) and REPORT not in getattr(batch, "extra", {})
    session.open(model, Facts(
        steps=steps, exact=exact, identify=loop.identify(batch), timesteps=_timesteps(batch, steps), groups=groups,
        # A stage that grows the picture starts small; schedules are tuned for the size that was asked for.
        size=stages[-1].size if stages else sglang_api.size_of(batch), one_config=one_config,
        solver=None if scheduler is None else Solver(scheduler, scheduler.step),
        stage_forecasts=loop is _BASE and native_stages.makes_base_steps(stage),
        unseen=next(filter(None, unseen), None), around=around,
        compiled=bool(server_args.enable_torch_compile) if batch.is_warmup and not around else None,
    ))


def _steps(stage: Any, num_inference_steps: int | tuple[int, int]) -> dict[str, tuple[int, int]]:
    primary, secondary = stage._cache_dit_step_counts(num_inference_steps)
    steps = {"transformer": (0, primary)}
    if stage.transformer_2 is not None:
        steps["transformer_2"] = (primary if isinstance(num_inference_steps, tuple) else 0, secondary)
    return steps


def _timesteps(batch: Any, steps: Mapping[str, tuple[int, int]]) -> tuple[float, ...] | None:
    timesteps = getattr(batch, "timesteps", None)
    total = max(first + count for first, count in steps.values())
    # A request of one step says the timestep of that one.
    return None if timesteps is None or timesteps.numel() < total else sglang_api.timesteps_of(batch)


def predict_noise(original: Callable[..., Any], stage: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``DenoisingStage._predict_noise_with_cfg``: a step that an error tolerance leaves out runs no branch."""
    session = next((each for each in reversed(WORKER.active.sessions) if each.owner is stage), None)
    if session is None or session.steps is None or not session.stage_decides:
        return original(stage, *args, **kwargs)
    second = kwargs["current_model"] is getattr(stage, "transformer_2", None)
    branches = [sglang_api.branch_name(branch.name) for branch in kwargs["cfg_policy"].branches]
    gate = kwargs["cfg_gate_state"] or {}
    before = gate.get("reused")
    return session.steps.predict(
        "transformer_2" if second else "transformer", branches, lambda: original(stage, *args, **kwargs),
        # Behind its gate the host runs the first branch alone, and adds the difference that it had from the other.
        lambda: () if gate.get("reused") == before else branches[1:],
    )


def _enter_own_loop(stage: Any, batch: Any, server_args: Any, loop: OwnLoop) -> None:
    """Open the request of a stage that never asks; raises RefusedError for one that is declined and ``strict``."""
    session = _begin(stage, batch)
    decision = session.decision
    if not decision.enabled and stage not in WORKER.models:
        return
    reason = loop.refused
    if decision.enabled and server_args.enable_breakable_cuda_graph:
        reason = reason or cuda_graphs.refusal(decision, batch)
    if not reason and getattr(stage, "transformer", None) is None:
        reason = "its transformer is not loaded yet"
    if not reason:
        steps = {"transformer": (0, native_stages.num_steps(batch))}
        _open(stage, batch, server_args, session, loop, steps, exact=getattr(batch, "timesteps", None) is not None)
    elif decision.enabled:
        session.refuse(reason_of(reason, "stage").after(type(stage).__name__))


def check_worker(worker: Any) -> None:
    """After a worker has loaded its model: one line for each transformer that will not be cached.

    Raises:
        MountError: with ``strict``, where caching is on for all requests.
    """
    if not effective.current().enabled:
        return
    settings = effective.current().decide(None, None).resolved.primary
    for name, module in getattr(worker.pipeline, "modules", {}).items():
        reason = why_not_cached(type(module), settings) if isinstance(module, nn.Module) else None
        if reason is None:
            continue
        if settings.strict:
            raise MountError(reason)
        if sglang_api.is_first_rank():
            sglang_api.logger().warning("cache-dit: off [%s]: %s: %s", reason.code, name, reason)


def run_stage(original: Callable[..., Any], stage: Any, batch: Any, server_args: Any) -> Any:
    """Around every stage: whatever happened in it, a request opened in it ends with it."""
    with _under_way(stage, [batch]) as active:
        before, loop = len(active.sessions), native_stages.of(type(stage))
        # Action models are served requests of another kind, which cannot ask for anything.
        if loop is not None and not loop.asks and getattr(batch, "sampling_params", None) is not None:
            _enter_own_loop(stage, batch, server_args, loop)
        result = original(stage, batch, server_args)
        for session in active.sessions[before:]:
            if session.recording is not None:
                session.recording.latents(getattr(result, "latents", None))
        if len(active.sessions) == before and sglang_api.overrides(stage, "_maybe_enable_cache_dit"):
            # It decided before it came to the method that it stands in place of.
            session = _begin(stage, batch)
            if session.decision.enabled:
                session.disable(native_stages.refusal(stage))
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
    """Around all stages of a request or group."""
    with request.under_way(), original(*args, **kwargs):
        yield


def _under_way(stage: Any, batches: Sequence[Any]) -> AbstractContextManager[request.ActiveRequest]:
    loop = native_stages.of(type(stage))
    if loop is None or not loop.one_step:
        return request.stage_under_way(stage, batches)
    return request.stage_under_way(stage, batches, functools.partial(_keep, batches[0]))


def _keep(batch: Any, opened: list[Session], failed: bool) -> list[Session]:
    """Of the sessions of a stage whose requests are single steps, those that end now; the others go on."""
    if failed:
        ended = [*opened, *WORKER.kept.values()]
        WORKER.kept.clear()
        return ended
    for session in opened:
        if session.owner._cache_dit_enabled:
            WORKER.kept[session.owner], session.batch = session, batch
    for session in WORKER.kept.values():
        if native_stages.same_run(session.batch, batch):
            session.batch = batch
            request.attach(batch, session.stats)
    return [session for session in opened if not session.owner._cache_dit_enabled]
