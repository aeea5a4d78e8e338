"""One request's stay in the cache, the same for both backends."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from ..cache import rank_agreement
from ..cache.denoising_steps import DenoisingSteps
from ..cache.mount import ModelBackend, preset_mask
from ..cache.runtime import Groups, RequestSpec, Runtime, TransformerSpec
from ..cache.solvers import Solver
from ..cache.step_plan import StepPlan, build_plan
from ..cache.stretch import Stretch
from ..cache.warmup import Rehearsal
from ..config import effective, resampling
from ..config.effective import Decision
from ..config.settings import CacheSettings
from ..config.sources import REQUEST, Source
from ..config.tuned_schedules import TunedSchedule
from ..errors import MountError, RefusedError, SettingError
from ..report import metrics
from ..report.stats import CorrectorStats, RequestStats, TransformerStats
from . import recording, sglang_api
from .recording import Recording

REPORT = "cache_dit"


def decide(enable: bool | None, params: Mapping[str, Any] | None, stage: Source | None = None) -> Decision:
    """What this worker's settings make of a request.

    Args:
        stage: what the host's stage wants by itself.

    Raises:
        RefusedError: they do not take it; the HTTP process checked it under settings that have changed since.
    """
    try:
        return effective.current().decide(enable, params, stage)
    except SettingError as error:
        if sglang_api.publishes_metrics():
            metrics.refused()
        raise RefusedError(error) from None


class Session:
    """From the decision on a request to its report.

    Args:
        backend_name: ``native`` or ``diffusers``.
        decision: whether and how the request is cached.
        further: another denoising stage has served the request before; schedules are tuned for that one.
    """

    def __init__(self, backend_name: str, decision: Decision, *, further: bool = False):
        self.decision = decision
        self.stats = RequestStats(
            backend=backend_name,
            enabled=decision.enabled,
            reason=decision.reason,
            profile=decision.resolved.profile,
            config=decision.resolved.config() if decision.enabled else {},
        )
        self._runtime: Runtime | None = None
        self._backend: ModelBackend | None = None
        self._positions: Sequence[float] | None = None
        self.steps: DenoisingSteps | None = None
        self.stage_decides = False
        self._hooks = ExitStack()
        self._further = further
        self.recording = None if further or recording.folder() is None else Recording()
        self._size: tuple[int, ...] | None = None
        self._rehearsal: Rehearsal | None = None
        self._started = time.perf_counter()

    def open(
        self,
        runtime: Runtime,
        backend: ModelBackend,
        steps: dict[str, tuple[int, int]],
        positions: Sequence[float] | None,
        *,
        size: tuple[int, ...] | None = None,
        one_config: bool = False,
        solver: Solver | None = None,
        followed: bool = False,
    ) -> None:
        """Bring the model to what the request wants.

        Args:
            solver: the pipeline's scheduler.
            followed: ``steps`` are those asked for; ``follow`` tells those of the run once they are known.
            size: width and height of the picture, and frames of a video.
            one_config: both transformers take the settings of the first.
            steps: for each transformer the host's number of its first step, and how many it takes.
            positions: place of each of the host's steps on the denoising path.

        Raises:
            RefusedError: only with ``strict``; otherwise the reason goes to the report.
        """
        self._runtime, self._backend = runtime, backend
        self._started = time.perf_counter()
        self._positions, self._size = positions, size
        if not self.decision.enabled:
            runtime.prepare(None)
            return
        if solver is None:
            self.stats.corrector = CorrectorStats(enabled=False, reason="the stage has no scheduler")
        else:
            self.steps = self._denoising_steps(solver, backend.groups)
        backend.stats = self.stats
        notes = list(self.stats.notes)
        spec = self._spec(steps, positions, one_config)
        if followed:
            self.stats.notes = notes
        self._serve(spec)

    def _denoising_steps(self, solver: Solver, groups: Groups) -> DenoisingSteps:
        resolved = self.decision.resolved
        asked = resolved.origins["corrector"] != "default"
        return DenoisingSteps(solver, resolved.primary, self.stats, groups, asked=asked)

    def open_for_stage(
        self, runtime: Runtime, backend: ModelBackend, steps: Mapping[str, tuple[int, int]], solver: Solver
    ) -> None:
        """An error tolerance decides before any branch runs: the transformers run as they are.

        Args:
            steps: as for ``open``.
            solver: the pipeline's scheduler.
        """
        self._runtime, self._backend = runtime, backend
        self._started = time.perf_counter()
        runtime.prepare(None)
        self.stage_decides = True
        self.stats.transformers.update({name: TransformerStats(steps=count) for name, (_, count) in steps.items()})
        self.steps = self._denoising_steps(solver, backend.groups)
        self.steps.read_places()

    def follow(self, steps: dict[str, tuple[int, int]], stretch: Stretch) -> None:
        """A run of the loop begins: what it takes of the scheduler's steps, by transformer and all.

        Nothing that was kept of an earlier run is of use to it.

        Raises:
            RefusedError: only with ``strict``; otherwise the reason goes to the report.
        """
        if self.stats.enabled:
            self._positions = stretch.positions
            if self._rehearsal is None:
                # A mask list may be written for the whole of which the run takes a part.
                self.check_masks(steps, also={stretch.asked, len(stretch.timesteps)})
            self._serve(self._spec(steps, stretch.positions, False, stretch))

    def _serve(self, spec: RequestSpec) -> None:
        assert self._backend is not None and self._runtime is not None
        groups, failure = self._backend.groups, None
        try:
            self._runtime.prepare(spec)
        except Exception as error:
            failure = error
        self._verify_ranks(groups, spec, failure)
        problem = self._problem(groups, failure)
        if failure is not None and not isinstance(failure, MountError):
            raise failure
        if problem:
            self._runtime.prepare(None)
            self.steps = None
            self.refuse(problem)
            return
        if self.steps is not None:
            self.steps.spec = spec
            self.steps.read_places()
        backend = self._backend
        if self.recording is not None:
            backend.watch(self.recording.forward)
        if self._rehearsal is not None:
            backend.rehearse(self._rehearsal)

    def hook_scheduler(self) -> None:
        """The scheduler's steps go through ``steps`` until the request ends."""
        if self.steps is not None:
            self._hooks.enter_context(self.steps.in_place())

    def rehearse(self, *, compiled: bool) -> None:
        """This is a warmup request: beside its own steps, run what later ones will run."""
        if self.stats.enabled and self._backend is not None:
            self._rehearsal = Rehearsal(sglang_api.logger().warning, compiled=compiled)
            self._backend.rehearse(self._rehearsal)

    def _problem(self, groups: Groups, own: Exception | None) -> str:
        """Why the request is not cached, empty where it is: no rank is, where one cannot be."""
        text = "" if own is None else str(own) or type(own).__name__
        group = groups.pair or groups.forward
        return text if group is None else rank_agreement.problems(text, group)

    def _verify_ranks(self, groups: Groups, spec: RequestSpec, problem: Exception | None) -> None:
        group = groups.pair or groups.forward
        if group is None or not self.decision.resolved.primary.verify_ranks:
            return
        wanted = repr([
            (each.name, each.settings, each.plan, each.uncond_plan, each.first_step) for each in spec.transformers
        ])
        number = hashlib.sha256(wanted.encode()).hexdigest()[:12]
        rank_agreement.verify_same("settings", f"uncached: {problem}" if problem else f"settings {number}", group)

    def refuse(self, reason: str) -> None:
        """The model or the settings cannot be served cached; the reason goes to the report.

        Raises:
            RefusedError: with ``strict``.
        """
        self.disable(reason)
        if self.decision.resolved.primary.strict:
            self.stats.refused = True
            raise RefusedError(SettingError("strict", True, self.decision.resolved.origins["strict"], reason))

    def check_masks(
        self, steps: Mapping[str, tuple[int, int]], one_config: bool = False, *, also: Collection[int] = ()
    ) -> None:
        """Refuse a mask list of the request that has one entry a step for none of its transformers, nor for all.

        Args:
            steps: those that will run, as for ``open``.
            one_config: as for ``open``.
            also: further lengths that fit.

        Raises:
            RefusedError: naming the lengths that fit.
        """
        if not self.decision.enabled:
            return
        resolved = self.decision.resolved
        total = max((first + count for first, count in steps.values()), default=0)
        masks: dict[str, tuple[int, set[int]]] = {}
        for name, (_, count) in steps.items():
            second = name == "transformer_2" and not one_config
            settings = resolved.secondary if second else resolved.primary
            origin = (resolved.secondary_origins if second else resolved.origins)["steps_computation_mask"]
            if isinstance(settings.steps_computation_mask, tuple) and origin.startswith(f"{REQUEST}."):
                masks.setdefault(origin, (len(settings.steps_computation_mask), {total, *also}))[1].add(count)
        for origin, (length, fitting) in masks.items():
            if length not in fitting:
                where, _, key = origin.rpartition(".")
                expected = " or ".join(map(str, sorted(fitting)))
                error = SettingError(key, f"{length} entries", where, f"expected {expected} entries, one a step")
                self.disable(str(error))
                self.stats.refused = True
                raise RefusedError(error)

    def disable(self, reason: str) -> None:
        """Report that the request runs uncached."""
        self.stats.enabled = False
        self.stats.reason = reason

    def _spec(
        self,
        steps: dict[str, tuple[int, int]],
        positions: Sequence[float] | None,
        one_config: bool,
        stretch: Stretch | None = None,
    ) -> RequestSpec:
        resolved = self.decision.resolved
        specs = []
        total = max((first + count for first, count in steps.values()), default=0)
        for name, (first, count) in steps.items():
            second = name == "transformer_2" and not one_config
            settings = resolved.secondary if second else resolved.primary
            settings, row = self._tuned(settings, total, positions, stretch)
            if settings.error_tolerance is None:
                plan, notes = build_plan(settings, count, preset_mask, first_step=first, total_steps=total)
            else:
                settings = replace(settings, forecast="output", forecast_order=1, forecast_damping=1.0)
                row, notes = None, ()
                plan = StepPlan(num_steps=count, static=True, computes=self._computes)
            for note in notes:
                self.stats.note(note)
            if count and not (plan.may_cache and (plan.static or settings.residual_diff_threshold > 0.0)):
                self.stats.note(f"{name}: none of its {count} steps can be cached with these settings")
            specs.append(
                TransformerSpec(
                    name=name, settings=settings, plan=plan, first_step=first, positions=positions,
                    uncond_plan=_uncond_plan(plan, row, first), weights=_weights(row),
                )
            )
        return RequestSpec(transformers=tuple(specs))

    def _computes(self) -> bool:
        return self.steps is None or self.steps.computes()

    def _tuned(
        self, settings: CacheSettings, steps: int, positions: Sequence[float] | None, stretch: Stretch | None
    ) -> tuple[CacheSettings, TunedSchedule | None]:
        """``settings`` with the schedule of the run: of a tuned one or a mask list for the whole its part."""
        mask = settings.steps_computation_mask
        if stretch is not None and isinstance(mask, tuple):
            settings = replace(settings, steps_computation_mask=stretch.mask(mask))
        if settings.schedules is None or steps == 0:
            return settings, None
        if self._further:
            self.stats.note(f"schedules are tuned for the first denoising stage, the {steps} steps are computed")
            return replace(settings, schedules=None, steps_computation_mask=(1,) * steps), None
        if stretch is None:
            row, note = resampling.choose(settings.schedules, steps, self._size, positions)
        else:
            row, note = resampling.choose(
                settings.schedules, len(stretch.timesteps), self._size, stretch.timesteps
            )
            row = stretch.row(row)
        if note is not None:
            self.stats.note(note)
        if row.uncond_mask not in (None, row.mask) and self._backend.groups.couple(settings):
            # One decision for both branches. Fitted weights belong to the steps that the row itself computes.
            both = tuple(map(max, row.mask, row.uncond_mask))
            row = replace(row, mask=both, uncond_mask=None, weights=None)
            self.stats.note("the branches decide together: steps that mask or uncond_mask marks are computed on both")
        return replace(
            settings,
            steps_computation_mask=row.mask,
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
            if self._runtime is not None:
                self._look_back()
        finally:
            # A device that has failed says so at the next call, whatever that is.
            self._hooks.close()
            self.steps = None
            if self._runtime is not None:
                self._runtime.prepare(None)
        if self.recording is not None and sglang_api.is_first_rank():
            self.recording.path(self._positions)
            self.recording.save(recording.folder())
        return self.stats

    def _look_back(self) -> None:
        """Report what the first forwards of the request have shown to be wrong with the mount."""
        if not self.stats.enabled or self.stage_decides or (problem := self._backend.problem()) is None:
            return
        if self.stats.count("cached"):
            self.stats.note(f"{problem}; the picture may be wrong, later requests are not cached")
        else:
            self.disable(problem)


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


def publish(batch: Any, stats: RequestStats, log: Callable[[str], None], *, failed: bool = False) -> None:
    """Attach the report to the request, count it, and write its log lines."""
    attach(batch, stats)
    count([batch], stats, log, failed=failed)


def attach(batch: Any, stats: RequestStats) -> None:
    """Attach the report to the request."""
    report = stats.as_dict()
    if (own := getattr(batch, "metrics", None)) is not None:
        own.cache_dit = report
    # Roles that run apart hand plain extras on, and drop the metrics.
    getattr(batch, "extra", {})[REPORT] = report


def count(
    batches: Sequence[Any], stats: RequestStats, log: Callable[[str], None], *, failed: bool = False
) -> None:
    """Count the report of requests that were denoised together, and write its log lines."""
    batches = [batch for batch in batches if not sglang_api.serves_nobody(batch)]
    if not batches:
        return
    if sglang_api.publishes_metrics():
        ended = "refused" if stats.refused else "failed" if failed else None
        merged = sum(len(getattr(batch, "extra", {}).get("dynamic_batch_seeds") or [0]) for batch in batches)
        metrics.observe(stats.as_dict(), requests=merged, ended=ended)
    if sglang_api.is_first_rank():
        for line in stats.lines():
            log(line)


def add_report(result: dict[str, Any], request_metrics: Any) -> dict[str, Any]:
    """After ``RequestMetrics.to_dict``: the request's report, where there is one."""
    report = getattr(request_metrics, REPORT, None)
    return result if report is None else result | {REPORT: report}
