"""One request in this worker, the same for both backends: what is kept of it, and its way from decision to report."""

from __future__ import annotations

import hashlib
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..cache import rank_agreement
from ..cache.cached_model import CachedModel, preset_mask
from ..cache.denoising_steps import DenoisingSteps
from ..cache.solvers import Solver
from ..cache.spec import Groups, Identify, RequestSpec, TransformerSpec
from ..cache.step_plan import StepPlan, build_plan
from ..cache.stretch import Stretch
from ..cache.warmup import Warmup
from ..config import effective
from ..config.effective import Decision
from ..config.settings import CacheSettings
from ..config.sources import REQUEST, Source
from ..config.tuned_schedules import TunedSchedule, choose
from ..errors import MountError, Reason, RefusedError, SettingError, reason_of, refusal_in
from ..report import metrics, table
from ..report.stats import CorrectorStats, RequestStats, TransformerStats, reports_of
from . import log, ranks, recording, sglang_api
from .recording import Recording

REPORT = "cache_dit"
WARMUP = "cache_dit_warmup"
"""Extra of a request that a client makes for its shape only: it is counted nowhere."""


class Running(NamedTuple):
    """A stage under way, its requests, and the size of the pictures that were asked of it."""

    stage: Any
    batches: Sequence[Any]
    size: tuple[int, ...] | None


@dataclass
class Served:
    """What denoising stages have done so far for requests that they served together."""

    batches: Sequence[Any]
    stats: RequestStats
    failed: bool


@dataclass
class ActiveRequest:
    """One request, or one group, on its way through the stages of this worker.

    Args:
        stages: those under way, outermost first.
        sessions: the open ones.
        served: what has ended.
        first: the first stage that denoised.
        branch: the host's name of the CFG branch whose forward comes next; the request itself carries only a boolean.
        guided: the branches of a guided step of Cosmos 3 run, shared out over the CFG ranks.
        entered: a stage or an executor of the host is inside.
    """

    stages: list[Running] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    first: Any = None
    branch: str | None = None
    guided: bool = False
    entered: bool = False


class Worker:
    """All that this process keeps between calls of the host.

    Attributes:
        active: the request under way.
        kept: by stage, the sessions of runs whose requests are single steps.
        models: by stage or pipeline, its transformers.
        slices: the ranks that must agree with this one.
        refusals: by offline engine, why its worker has refused the request under way.
    """

    def __init__(self) -> None:
        self.active = ActiveRequest()
        self.kept: dict[Any, Session] = {}
        self.models: weakref.WeakKeyDictionary[Any, CachedModel] = weakref.WeakKeyDictionary()
        self.slices = ranks.Slices()
        self.refusals: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


WORKER = Worker()


def groups_ready(result: Any = None, *args: Any, **kwargs: Any) -> None:
    """After ``initialize_model_parallel``, on every rank."""
    WORKER.slices = ranks.slices()


def describe_models() -> list[dict[str, Any]]:
    """Every model of this process whose transformers are mounted."""
    return [model.describe() for model in list(WORKER.models.values()) if model.mounted]


@contextmanager
def under_way() -> Iterator[ActiveRequest]:
    """One request or group, through all its stages: it is counted once, however many of them denoise."""
    if WORKER.active.entered:
        yield WORKER.active
        return
    active = WORKER.active = ActiveRequest(entered=True)
    try:
        yield active
    finally:
        WORKER.active = ActiveRequest()
        for served in active.served:
            count(served.batches, served.stats, failed=served.failed)


@contextmanager
def stage_under_way(
    stage: Any, batches: Sequence[Any],
    ending: Callable[[list[Session], bool], list[Session]] = lambda opened, failed: opened,
) -> Iterator[ActiveRequest]:
    """Around a stage of the host: whatever happens in it, sessions that begin in it end with it.

    Args:
        ending: of the sessions that have begun, and whether the stage failed: those that end.
    """
    with under_way() as active:
        before, failed = len(active.sessions), True
        active.stages.append(Running(stage, batches, sglang_api.size_of(batches[0])))
        try:
            yield active
            failed = False
        finally:
            active.stages.pop()
            opened, active.sessions[before:] = active.sessions[before:], []
            with ExitStack() as ends:
                # Each is ended, whatever the end of another one raises.
                for session in ending(opened, failed):
                    ends.callback(end, session, batches, failed)


def begin(backend: str, owner: Any, batch: Any, own: Source | None = None) -> Session:
    """Decide on a request.

    Args:
        owner: the stage or the pipeline that has the transformers.
        own: what the stage wants by itself.

    Raises:
        RefusedError: the settings of this worker do not take it; the HTTP process checked it under settings that have
            changed since.
    """
    active, params = WORKER.active, batch.sampling_params
    decision = decide(params.enable_cache_dit, params.cache_dit_params, own)
    outermost = active.stages[0].stage if active.stages else owner
    if active.entered and active.first is None:
        active.first = outermost
    further = active.entered and active.first is not outermost
    session = Session(backend, decision, owner=owner, batch=batch, further=further)
    active.sessions.append(session)
    active.branch = None
    return session


def decide(enable: bool | None, params: Mapping[str, Any] | None, stage: Source | None = None) -> Decision:
    """What this worker's settings make of a request; as for ``begin``."""
    try:
        return effective.current().decide(enable, params, stage)
    except SettingError as error:
        if sglang_api.publishes_metrics():
            metrics.refused()
        if sglang_api.is_first_rank():
            log.say("requests", f"a request that waited is refused: {error}")
        raise RefusedError(error) from None


def end(session: Session, batches: Sequence[Any], failed: bool = False) -> None:
    """Close a session, and put its report to those of the request."""
    module = getattr(session.owner, "transformer", None)
    parameters = module.parameters() if isinstance(module, nn.Module) else iter(())
    stats = session.close(next((each.device for each in parameters), None))
    served = next((each for each in WORKER.active.served if each.batches[0] is batches[0]), None)
    if served is None:
        served = Served(batches, stats, failed)
        WORKER.active.served.append(served)
    else:
        served.stats.add_stage(type(session.owner).__name__, stats)
        served.failed = served.failed or failed
    for batch in batches:
        attach(batch, served.stats)


def attach(batch: Any, stats: RequestStats) -> None:
    """Attach the report to the request."""
    report = stats.as_dict()
    if (own := getattr(batch, "metrics", None)) is not None:
        own.cache_dit = report
    # Roles that run apart hand plain extras on, and drop the metrics.
    getattr(batch, "extra", {})[REPORT] = report


def count(batches: Sequence[Any], stats: RequestStats, *, failed: bool = False) -> None:
    """Count the report of requests that were denoised together, and write its log line."""
    batches = [batch for batch in batches if not sglang_api.serves_nobody(batch)]
    batches = [batch for batch in batches if WARMUP not in getattr(batch, "extra", ())]
    if not batches:
        return
    ended = "refused" if stats.refused else "failed" if failed else None
    if sglang_api.publishes_metrics():
        merged = sum(len(getattr(batch, "extra", {}).get("dynamic_batch_seeds") or [0]) for batch in batches)
        metrics.observe(stats.as_dict(), requests=merged, ended=ended)
    if not sglang_api.is_first_rank() or not log.wanted("requests"):
        return
    # A server where nobody has asked for caching says nothing of it.
    if stats.refused or effective.current().enabled or metrics.outcome(stats.as_dict()) != "off":
        names = ", ".join(name for each in batches if (name := getattr(each, "request_id", None)))
        sglang_api.logger().info(stats.line(names, ended or ""))


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the host's stage or pipeline says of a request.

    Args:
        steps: for each transformer the host's number of its first step, and how many it takes.
        identify: names each forward.
        exact: those are the steps that will run: a mask list of the request that does not fit them is refused.
        timesteps: of each of the host's steps.
        groups: the ranks that take part; the host may lay them out differently from one request to the next.
        size: width and height of the picture, and frames of a video.
        one_config: both transformers take the settings of the first.
        solver: the pipeline's scheduler; None: it has none.
        stage_forecasts: all steps of the stage go through ``Session.steps``: under an error tolerance the stage
            decides, before any branch runs.
        unseen: why no step may go through the scheduler, as far as that is known.
        followed: a pipeline knows what its run takes of the scheduler's steps once that begins, and hooks its
            scheduler itself; see ``Session.follow``.
        stretch: what the run takes.
        around: as for ``RequestSpec``.
        compiled: of a warmup request, whether the host compiles; None: it is no warmup request.
    """

    steps: Mapping[str, tuple[int, int]]
    identify: Identify
    exact: bool = False
    timesteps: Sequence[float] | None = None
    groups: Groups = field(default_factory=Groups)
    size: tuple[int, ...] | None = None
    one_config: bool = False
    solver: Solver | None = None
    stage_forecasts: bool = False
    unseen: str | None = None
    followed: bool = False
    stretch: Stretch | None = None
    around: bool = False
    compiled: bool | None = None


class Session:
    """One denoising stage's part of a request, from the decision to the report.

    Args:
        backend: ``native`` or ``diffusers``.
        decision: whether and how the request is cached.
        owner: the stage or the pipeline that has the transformers.
        batch: the host's request.
        further: another denoising stage has served the request before; schedules are tuned for that one.

    Attributes:
        steps: the steps at the scheduler, None where nobody looks at them.
        stage_decides: the transformers run as they are, and ``steps`` decides.
    """

    def __init__(
        self, backend: str, decision: Decision, *, owner: Any = None, batch: Any = None, further: bool = False
    ):
        self.decision, self.owner, self.batch = decision, owner, batch
        self.stats = RequestStats(
            backend=backend, enabled=decision.enabled, reason=decision.reason, profile=decision.resolved.profile,
            config=decision.resolved.config() if decision.enabled else {},
        )
        self.steps: DenoisingSteps | None = None
        self.stage_decides = False
        self.recording = None if further or recording.folder() is None else Recording()
        self._further = further
        self._model: CachedModel | None = None
        self._facts: Facts | None = None
        self._spec: RequestSpec | None = None
        self._warmup: Warmup | None = None
        self._hooks = ExitStack()
        self._started = time.perf_counter()

    def open(self, model: CachedModel, facts: Facts) -> None:
        """Bring the model to what the request wants.

        Raises:
            RefusedError: a mask list of the request does not fit, or whatever else is in the way, with ``strict``;
                otherwise the reason goes to the report.
        """
        self._model, self._facts, self._started = model, facts, time.perf_counter()
        if not self.decision.enabled:
            model.prepare(None)
            return
        if facts.exact:
            self._check_masks()
        resolved = self.decision.resolved
        if facts.solver is None:
            self.stats.corrector = CorrectorStats(enabled=False, reason="the stage has no scheduler")
        else:
            asked = resolved.origins["corrector"] != "default"
            self.steps = DenoisingSteps(facts.solver, resolved.primary, self.stats, facts.groups, asked=asked)
            self.steps.unseen = facts.unseen or self.steps.unseen
        if facts.compiled is not None:
            self._warmup = Warmup(sglang_api.logger().warning, compiled=facts.compiled)
        if facts.stage_forecasts and self.steps is not None and resolved.primary.error_tolerance is not None:
            model.prepare(None)
            self.stage_decides = True
            self.stats.transformers.update(
                {name: TransformerStats(steps=count) for name, (_, count) in facts.steps.items()}
            )
            self.steps.read_places()
        else:
            self._serve(self._wanted())
        if self.steps is not None and not facts.followed:
            self._hooks.enter_context(self.steps.in_place())

    def follow(self, steps: Mapping[str, tuple[int, int]], stretch: Stretch) -> None:
        """A run of the loop begins: what it takes of the scheduler's steps, by transformer and all.

        Nothing that was kept of an earlier run is of use to it.

        Raises:
            RefusedError: only with ``strict``; otherwise the reason goes to the report.
        """
        if self.stats.enabled:
            self._facts = replace(self._facts, steps=steps, timesteps=stretch.positions, stretch=stretch)
            if self._warmup is None:
                self._check_masks()
            self._serve(self._wanted())

    def grow(self, timesteps: Sequence[float] | None) -> None:
        """The picture has grown: nothing kept of the small one is of use. Steps keep their numbers.

        Args:
            timesteps: the host may have moved the next step back on the path; None: it has not.
        """
        if self._spec is not None:
            if timesteps is not None:
                moved = tuple(replace(each, timesteps=timesteps) for each in self._spec.transformers)
                self._spec = replace(self._spec, transformers=moved)
            self._model.prepare(self._spec)
        if self.steps is not None:
            self.steps.grow()

    def _serve(self, spec: RequestSpec) -> None:
        failure = None
        try:
            self._model.prepare(spec)
        except Exception as error:
            failure = error
        problem = self._problem(spec, failure)
        if failure is not None and not isinstance(failure, MountError):
            raise failure
        if problem:
            self._model.prepare(None)
            self.steps = self._spec = None
            self.refuse(problem)
            return
        self._spec = spec
        if self.steps is not None:
            self.steps.spec = spec
            self.steps.read_places()

    def _problem(self, spec: RequestSpec, own: Exception | None) -> str:
        """Why the request is not cached, empty where it is: no rank is, where one cannot be."""
        text = "" if own is None else reason_of(own, "blocks")
        group = spec.groups.cfg_group or spec.groups.forward
        if group is None:
            return text
        if self.decision.resolved.primary.verify_ranks:
            wanted = repr([
                (each.name, each.settings, each.plan, each.uncond_plan, each.first_step) for each in spec.transformers
            ])
            number = hashlib.sha256(wanted.encode()).hexdigest()[:12]
            rank_agreement.verify_same("settings", f"uncached: {own}" if own else f"settings {number}", group)
        found = rank_agreement.problems(text, group)
        return found and reason_of(text or found, "other_rank")

    def refuse(self, reason: str) -> None:
        """The model or the settings cannot be served cached; the reason goes to the report.

        Raises:
            RefusedError: with ``strict``.
        """
        self.disable(reason)
        if self.decision.resolved.primary.strict:
            self.stats.refused = True
            raise RefusedError(SettingError("strict", True, self.decision.resolved.origins["strict"], reason))

    def disable(self, reason: str) -> None:
        """Report that the request runs uncached."""
        self.stats.enabled = False
        self.stats.reason = reason

    def _check_masks(self) -> None:
        """Refuse a mask list of the request that has one entry a step for none of its transformers, nor for all.

        Raises:
            RefusedError: naming the lengths that fit.
        """
        facts, stretch = self._facts, self._facts.stretch
        # A mask list may be written for the whole of which a run takes a part.
        whole = {_total(facts.steps)} if stretch is None else {
            _total(facts.steps), stretch.asked, len(stretch.timesteps)
        }
        masks: dict[str, tuple[int, set[int]]] = {}
        for name, (_, count) in facts.steps.items():
            settings, origins = self._settings(name)
            origin = origins["steps_computation_mask"]
            if isinstance(settings.steps_computation_mask, tuple) and origin.startswith(f"{REQUEST}."):
                masks.setdefault(origin, (len(settings.steps_computation_mask), set(whole)))[1].add(count)
        for origin, (length, fitting) in masks.items():
            if length not in fitting:
                where, _, key = origin.rpartition(".")
                expected = " or ".join(map(str, sorted(fitting)))
                error = SettingError(key, f"{length} entries", where, f"expected {expected} entries, one a step")
                self.disable(Reason("refused", error))
                self.stats.refused = True
                raise RefusedError(error)

    def _settings(self, name: str) -> tuple[CacheSettings, Mapping[str, str]]:
        """Settings of a transformer, and where each comes from."""
        resolved = self.decision.resolved
        if name == "transformer_2" and not self._facts.one_config:
            return resolved.secondary, resolved.secondary_origins
        return resolved.primary, resolved.origins

    def _wanted(self) -> RequestSpec:
        """What the request wants, as far as the facts are known."""
        facts, specs, notes = self._facts, [], list(self.stats.notes)
        total = _total(facts.steps)
        for name, (first, count) in facts.steps.items():
            settings, row = self._tuned(self._settings(name)[0], total)
            if settings.error_tolerance is None:
                plan, found = build_plan(settings, count, preset_mask, first_step=first, total_steps=total)
            else:
                settings = replace(settings, forecast="output", forecast_order=1, forecast_damping=1.0)
                row, found = None, ()
                plan = StepPlan(num_steps=count, static=True, computes=self._computes)
            for note in found:
                self.stats.note(Reason("schedule", note))
            if count and not (plan.may_cache and (plan.static or settings.residual_diff_threshold > 0.0)):
                self.stats.note(Reason("steps", f"{name}: none of its {count} steps can be cached with these settings"))
            specs.append(
                TransformerSpec(
                    name=name, settings=settings, plan=plan, first_step=first, timesteps=facts.timesteps,
                    uncond_plan=_uncond_plan(plan, row, first), weights=_weights(row),
                )
            )
        if facts.followed and facts.stretch is None:
            # The pipeline's run has not begun: nothing of its steps is known that the report could say.
            self.stats.notes = notes
        return RequestSpec(
            transformers=tuple(specs), stats=self.stats, identify=facts.identify, groups=facts.groups,
            around=facts.around, warmup=None if self._warmup is None else self._warmup.run,
            on_forward=None if self.recording is None else self.recording.forward,
        )

    def _computes(self) -> bool:
        return self.steps is None or self.steps.computes()

    def _tuned(self, settings: CacheSettings, steps: int) -> tuple[CacheSettings, TunedSchedule | None]:
        """``settings`` with the schedule of the run: of a tuned one or a mask list for the whole its part."""
        facts, stretch, mask = self._facts, self._facts.stretch, settings.steps_computation_mask
        if stretch is not None and isinstance(mask, tuple):
            settings = replace(settings, steps_computation_mask=stretch.mask(mask))
        if settings.schedules is None or steps == 0:
            return settings, None
        if self._further:
            why = f"schedules are tuned for the first denoising stage, the {steps} steps are computed"
            self.stats.note(Reason("schedule", why))
            return replace(settings, schedules=None, steps_computation_mask=(1,) * steps), None
        if stretch is None:
            row, note = choose(settings.schedules, steps, facts.size, facts.timesteps)
        else:
            row, note = choose(settings.schedules, len(stretch.timesteps), facts.size, stretch.timesteps)
            row = stretch.row(row)
        if note is not None:
            self.stats.note(Reason("schedule", note))
        if row.uncond_mask not in (None, row.mask) and facts.groups.couple(settings):
            # One decision for both branches. Fitted weights belong to the steps that the row itself computes.
            both = tuple(map(max, row.mask, row.uncond_mask))
            row = replace(row, mask=both, uncond_mask=None, weights=None)
            why = "the branches decide together: steps that mask or uncond_mask marks are computed on both"
            self.stats.note(Reason("branches", why))
        return replace(
            settings, steps_computation_mask=row.mask,
            forecast_order=settings.forecast_order if row.order is None else row.order,
            forecast_damping=settings.forecast_damping if row.damping is None else row.damping,
        ), row

    def close(self, device: torch.device | None = None) -> RequestStats:
        """End the request: free its buffers and finish its report."""
        try:
            if device is not None and device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            self.stats.denoising_s = time.perf_counter() - self._started
            if self.steps is not None:
                self.steps.finish()
            self._look_back()
        finally:
            # A device that has failed says so at the next call, whatever that is.
            self._hooks.close()
            self.steps = self._spec = None
            if self._model is not None:
                self._model.prepare(None)
        if self.recording is not None and sglang_api.is_first_rank():
            self.recording.path(None if self._facts is None else self._facts.timesteps)
            self.recording.save(recording.folder())
        return self.stats

    def _look_back(self) -> None:
        """Report what the first forwards of the request have shown to be wrong with the mount."""
        if self._spec is None or not self.stats.enabled or (problem := self._model.problem()) is None:
            return
        if self.stats.count("cached"):
            self.stats.note(Reason("picture", f"{problem}; the picture may be wrong, later requests are not cached"))
        else:
            self.disable(reason_of(problem, "blocks"))


def _total(steps: Mapping[str, tuple[int, int]]) -> int:
    return max((first + count for first, count in steps.values()), default=0)


def _uncond_plan(plan: StepPlan, row: TunedSchedule | None, first: int) -> StepPlan | None:
    if row is None or row.uncond_mask in (None, row.mask):
        return None
    return replace(plan, mask=row.uncond_mask[first : first + plan.num_steps])


def _weights(row: TunedSchedule | None) -> dict[int, tuple[float, ...]]:
    if row is None or row.weights is None:
        return {}
    cached = [step for step, computed in enumerate(row.mask) if not computed]
    # No weights: those of the extrapolation.
    return {step: weights for step, weights in zip(cached, row.weights, strict=True) if weights}


# The process that asks: reports in its answers, bad settings as errors, a table after each request.


def add_report(result: dict[str, Any], request_metrics: Any) -> dict[str, Any]:
    """After ``RequestMetrics.to_dict``: the request's report, where there is one."""
    report = getattr(request_metrics, REPORT, None)
    return result if report is None else result | {REPORT: report}


def generate(
    original: Callable[..., Any], generator: Any, sampling_params_kwargs: Mapping[str, Any] | None = None,
    external_trace_header: Any = None,
) -> Any:
    """Around ``DiffGenerator.generate``, which logs a worker's error and returns None.

    A generator that uses a server elsewhere leaves the check to that server, whose profiles are not known here.

    Raises:
        SettingError: cache settings of the request cannot be used.
        RefusedError: a worker found that out, for all prompts.
    """
    if generator.local_scheduler_process:
        effective.current().check(sampling_params_kwargs or {})
    WORKER.refusals.pop(generator, None)
    result = original(generator, sampling_params_kwargs, external_trace_header)
    if result is None and (reason := WORKER.refusals.pop(generator, None)) is not None:
        raise RefusedError(reason)
    return result


def answered(result: Any, generator: Any, batch: Any) -> None:
    """After the offline engine had its answer: log the request's steps and residual differences.

    The engine of a server's workers never comes here, so servers keep to one line a request.
    """
    if (reason := refusal_in(str(getattr(result, "error", None) or ""))) is not None:
        WORKER.refusals[generator] = reason
    found = table.lines(reports_of(result))
    if found and not any(map(sglang_api.serves_nobody, batch)):
        sglang_api.logger().info("\n".join(["cache-dit: steps and residual differences", *found]))
