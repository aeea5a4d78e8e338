"""The steps of one denoising loop at the scheduler: which ones were cached, corrected, and which come next."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..config.settings import CacheSettings
from ..errors import Reason
from ..report.stats import COND, ErrorStats, RequestStats
from . import rank_agreement
from .compiling import untraced
from .corrector import Corrector
from .error_control import ErrorControl
from .forecast import Extrapolator
from .similarity import Reading, relative_error
from .solvers import Call, Place, Solver, hooked_scheduler
from .spec import Groups, RequestSpec
from .step_plan import Action

CARRY, CONTROLLED_CARRY = 0.5, 0.75
"""How far computed outputs follow corrected latents; under an error tolerance forecasts start from them too."""


class DenoisingSteps:
    """One denoising loop, seen from its scheduler.

    Args:
        solver: the pipeline's scheduler.
        settings: those of the first transformer.
        stats: the request's record; it says what was computed since the last step.
        groups: the ranks that hold parts or branches of the same latents.
        asked: the corrector was asked for, not only left on: it corrects where it would step aside.

    Attributes:
        spec: what the request wants of each transformer, None where no transformer decides.
        unseen: the reason in the report where no step goes through the scheduler.
    """

    def __init__(
        self, solver: Solver, settings: CacheSettings, stats: RequestStats, groups: Groups, *, asked: bool = False
    ):
        self._stats, self._groups = stats, groups
        self.spec: RequestSpec | None = None
        self.unseen = "no step went through the pipeline's scheduler"
        self._solver = solver
        self._settings, self._unfit = settings, False
        self._outputs = Extrapolator(1, depth=3)
        controlled, carry = settings.error_tolerance is not None, settings.corrector_carry
        if carry is None:
            carry = CONTROLLED_CARRY if controlled else CARRY
        self._corrector = Corrector(self._outputs, settings.corrector_order, carry, keep=controlled)
        self._report = stats.corrector
        if problem := self._solver.problem():
            self._give_up(problem)
        elif not settings.corrector:
            self._report.enabled, self._report.reason = False, "corrector: false"
        self._control: ErrorControl | None = None
        self._error: tuple[int, float, Reading] | None = None
        if settings.error_tolerance is not None:
            stats.error_control = ErrorStats(settings.error_tolerance)
        self._counted: dict[tuple[str, str], tuple[int, int]] = {}
        self._ran: frozenset[tuple[str, str]] = frozenset()
        self._combined: frozenset[tuple[str, str]] = frozenset()
        self._left_out: frozenset[str] = frozenset()
        self._shape: torch.Size | None = None
        self._count, self._last = 0, -1
        self._chosen = asked

    def _give_up(self, reason: str) -> None:
        """Steps of this scheduler cannot be repeated: nothing is corrected, and no tolerance leaves out a step."""
        self._report.enabled, self._report.reason = False, reason
        self._unfit = True
        self._corrector.forget()
        if self._settings.error_tolerance is not None:
            self._control = None
            self._stats.note(Reason("error_control", f"error_tolerance: {reason}; every step is computed"))

    def _choose(self, ran: frozenset[tuple[str, str]]) -> None:
        """Leave the corrector out where measurement shows that it does harm, unless it was asked for."""
        self._chosen = True
        settings, specs = self._settings, () if self.spec is None else self.spec.transformers
        guided = self._groups.cfg_group is not None or len({branch for _, branch in ran}) > 1
        forecast = settings.forecast == "output" or settings.calibrator is not None
        if not self._report.enabled:
            return
        if any(each.weights for each in specs):
            self._report.enabled, self._report.reason = False, "fitted weights were searched without it"
        elif guided and forecast:
            self._report.enabled, self._report.reason = False, "forecasts under guidance are better left as they are"

    def _keep_errors(self) -> None:
        """Hand what error control saw of this loop to the report."""
        if self._control is not None and self._stats.error_control is not None:
            self._settle()
            self._stats.error_control.add_loop(self._control.errors, self._control.passed_on)
            if self._control.problem is not None:
                why = f"{self._control.problem}: every step after it was computed"
                self._stats.note(Reason("error_control", why))

    def grow(self) -> None:
        """The picture has grown: nothing before counts, and the host may have moved the scheduler's next steps."""
        self._solver.read_again()
        self._forget()
        if self._control is not None:
            self._control.positions = self._solver.positions(self._solver.index(self._count) - self._count)

    def _forget(self) -> None:
        """What comes next has nothing to do with the outputs before."""
        self._outputs.clear()
        self._corrector.forget()
        if self._control is not None:
            self._control.restart()

    def begin_loop(self) -> None:
        """The scheduler's timesteps are set anew: another loop begins."""
        self._forget()
        self._keep_errors()
        self._control, self._count, self._last = None, 0, -1

    def read_places(self) -> None:
        """Read the scheduler's timesteps now, before the loop: the host waits for the device."""
        self._solver.place(0)

    @untraced
    def computes(self) -> bool:
        """Whether the step under way is computed, where an error tolerance decides."""
        return self._control is None or self._control.computes(self._count)

    def predict(
        self, transformer: str, branches: Sequence[str], compute: Callable[[], Any],
        reused: Callable[[], Collection[str]] = tuple,
    ) -> Any:
        """The guided model output of the step under way: computed, or the forecast from those before.

        Args:
            transformer: name of the one that would run.
            branches: those of which the output would be combined.
            reused: after ``compute``, those of them that the host had from an earlier step.
        """
        ran = self._combined = frozenset((transformer, branch) for branch in branches)
        cached = ran == self._ran and not self.computes()
        output = self.forecast() if cached else compute()
        if not cached:
            self._left_out = frozenset(reused())
        for branch in (each for each in branches if each not in self._left_out):
            self._stats.transformers[transformer].branch(branch).record(self._count, cached)
        return output

    def forecast(self) -> torch.Tensor:
        """The model output of the step under way, from those before."""
        return self._outputs.predict(self._place().position)

    def _place(self) -> Place:
        return self._solver.place(self._solver.index(self._count))

    def _settle(self) -> None:
        """Take in the error of the last computed step, one computed step later: no device waits for the host."""
        if self._error is not None and self._control is not None:
            step, spread, reading = self._error
            self._control.measured(step, spread, reading.read())
        self._error = None

    def in_place(self) -> AbstractContextManager[None]:
        """The scheduler's ``step`` is this one inside."""
        step = functools.wraps(self._solver.own_step)(lambda *args, **kwargs: self.step(*args, **kwargs))
        return hooked_scheduler(self._solver.scheduler, step=step)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the scheduler's ``step``: what it returns, after correction."""
        solver = self._solver
        cached, ran = self._since_last_step()
        if not self._chosen and ran:
            self._choose(ran)
        if self._unfit or not (self._report.enabled or self._settings.error_tolerance is not None):
            self._count += 1
            return solver.own_step(*args, **kwargs)
        call = solver.bind(args, kwargs)
        if (reason := solver.refusal(call)) or (cached and not solver.repeats(call) and (reason := _UNSTEADY)):
            self._give_up(reason)
            self._count += 1
            return solver.own_step(*args, **kwargs)
        if self._count and solver.set_anew():
            # The next clip of a video, which knows of no step yet.
            self.begin_loop()
        if self._count == 0:
            solver.begin(call)
        index = solver.index(self._count)
        if index <= self._last:
            self.begin_loop()
            solver.begin(call)
        elif (ran and self._ran not in (ran, frozenset())) or call.sample.shape != self._shape:
            self._forget()
        self._last, self._shape, self._ran = index, call.sample.shape, ran or self._ran
        cached, place = self._cached_on_all_ranks(cached), solver.place(index)
        if not cached:
            self._computed(call, place, index)
        self._count += 1
        result = self._advance(call, place, cached)
        # The next forward is the peak of the memory: it needs two outputs beside its own.
        self._outputs.evict_oldest()
        return result

    def _advance(self, call: Call, place: Place, cached: bool) -> Any:
        """The scheduler's step, corrected where the corrector is on."""
        if not self._report.enabled:
            return self._solver.advance(call)
        if not cached:
            return self._corrector.computed(self._solver, call, place)
        if self._control is not None and self.spec is not None:
            # The transformers forecast from their own outputs; the ones kept here have followed the corrected latents.
            call = call.with_tensors(self._outputs.predict(place.position), call.sample)
        return self._corrector.cached(self._solver, call, place)

    def _computed(self, call: Call, place: Place, index: int) -> None:
        """Keep a computed output; start measuring how far its forecast was off."""
        tolerance = self._settings.error_tolerance
        if tolerance is not None:
            if self._control is None:
                self._control = ErrorControl(tolerance, self._solver.positions(index - self._count))
            self._settle()
            if self._control.measures:
                forecast = self._outputs.predict(place.position)
                # The output of a stage that runs one sample may have no batch dimension; its latents have.
                batch = len(call.sample)
                group = self._groups.cfg_group or self._groups.forward
                error = relative_error(forecast.reshape(batch, -1), call.output.reshape(batch, -1), group)
                self._error = self._count, self._control.spread(self._count), Reading(error)
            self._control.computed(self._count)
        # The host may reuse the memory of an output, as CUDA graphs do.
        self._outputs.update(place.position, call.output.detach().clone())

    def _since_last_step(self) -> tuple[bool, frozenset[tuple[str, str]]]:
        """Whether any forward since the last step was cached, and the transformers and branches that ran."""
        ran, cached = [], False
        for name, transformer in self._stats.transformers.items():
            for branch, each in transformer.branches.items():
                counts = len(each.computed), len(each.cached)
                before = self._counted.get((name, branch), (0, 0))
                if counts != before:
                    self._counted[name, branch] = counts
                    ran.append((name, branch))
                    cached = cached or counts[1] != before[1]
        # Of what a stage has combined, all counts, whatever of it ran in this step.
        combined, self._combined = self._combined, frozenset()
        return cached, combined or frozenset(ran)

    def _cached_on_all_ranks(self, cached: bool) -> bool:
        """Whether the step counts as cached: under CFG parallel each rank knows its own branch only.

        Where the schedule is static, or the decision is made for both branches, all ranks know without talking.
        """
        cfg_group = self._groups.cfg_group
        if cfg_group is None or cfg_group is self._groups.forward:
            return cached
        name = next((name for name, _ in self._ran), None)
        specs = () if self.spec is None else self.spec.transformers
        spec = next((each for each in specs if each.name == name), None)
        if spec is None or spec.plan.computes is not None:
            return cached
        step = self._count - spec.first_step
        actions = {spec.plan_of(branch).action(step) for branch in (COND, "uncond")}
        if actions == {Action.COMPUTE}:
            return False
        if spec.plan.static:
            return Action.CACHE in actions
        return rank_agreement.any_rank(cached, cfg_group)

    def finish(self) -> None:
        """The loop has ended: complete the report. Waits for the device."""
        if self._count == 0 and self._report.enabled:
            self._give_up(self.unseen)
        self._keep_errors()
        self._report.corrected_steps = self._corrector.corrected
        largest = math.nan if self._corrector.largest is None else float(self._corrector.largest)
        self._report.largest_correction = round(largest, 6) if math.isfinite(largest) else None

    def held_bytes(self) -> int:
        return self._outputs.held_bytes() + self._corrector.held_bytes()


_UNSTEADY = "its scheduler gives another result when a step is repeated"
