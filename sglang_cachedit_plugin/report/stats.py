"""What one request did, and totals since the process started."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import Reason, one_line, reason_of
from .reasons import codes_of

COND = "cond"
COND_ONLY = "cond_only"
"""The conditional forward of a step without guidance, which every CFG rank runs."""


@dataclass
class BranchStats:
    """Steps of one CFG branch, numbered as the host numbers them."""

    computed: list[int] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    residual_diffs: dict[int, float] = field(default_factory=dict)
    nan_diffs: int = 0

    def record(self, step: int, cached: bool) -> None:
        """Note one finished forward."""
        (self.cached if cached else self.computed).append(step)

    def measured(self, step: int, diff: float) -> None:
        """Note one measured residual difference; NaN and infinity are counted as NaN, not listed."""
        if not math.isfinite(diff):
            self.nan_diffs += 1
        else:
            self.residual_diffs.setdefault(step, diff)

    def as_dict(self) -> dict[str, Any]:
        """The form of the report."""
        return {
            "computed": list(self.computed),
            "cached": list(self.cached),
            "residual_diffs": {str(step): round(diff, 6) for step, diff in self.residual_diffs.items()},
            "nan_diffs": self.nan_diffs,
        }


@dataclass
class TransformerStats:
    """One transformer's steps and branches."""

    steps: int
    branches: dict[str, BranchStats] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    remarks: dict[str, str] = field(default_factory=dict)

    def remark(self, topic: str, text: str) -> None:
        """Add a remark in place of the last one on the same topic."""
        self.remarks[topic] = text

    def branch(self, name: str) -> BranchStats:
        """The branch, made on first use."""
        return self.branches.setdefault(name, BranchStats())

    def as_dict(self) -> dict[str, Any]:
        """The form of the report."""
        return {"steps": self.steps, "branches": {n: b.as_dict() for n, b in self.branches.items()}}


@dataclass
class CorrectorStats:
    """What the corrector did.

    Args:
        enabled: whether cached steps were to be corrected.
        reason: why not.
        corrected_steps: cached steps that were set right.
        largest_correction: norm of the largest correction relative to that of the latents, on this rank's part.
    """

    enabled: bool = True
    reason: str | None = None
    corrected_steps: int = 0
    largest_correction: float | None = None

    def add(self, stage: str, other: CorrectorStats) -> None:
        """Add what was corrected in a further denoising stage."""
        self.enabled = self.enabled or other.enabled
        self.reason = self.reason or (other.reason and f"{stage}: {other.reason}")
        self.corrected_steps += other.corrected_steps
        sizes = [each for each in (self.largest_correction, other.largest_correction) if each is not None]
        self.largest_correction = max(sizes, default=None)


@dataclass
class ErrorStats:
    """What error control saw.

    Args:
        tolerance: the error that was allowed.
        errors: relative error of the forecast at each computed step where there was one; the steps of a further loop or
            stage are named after it.
        passed_on: estimated error that the cached steps passed on to the latents, summed over all loops.
        loops: how many there were.
    """

    tolerance: float
    errors: dict[int | str, float] = field(default_factory=dict)
    passed_on: float = 0.0
    loops: int = 0

    def add_loop(self, errors: Mapping[int, float], passed_on: float) -> None:
        """Add what was seen in a denoising loop."""
        self.loops += 1
        first = self.loops == 1
        self.errors |= {step if first else f"loop {self.loops}: {step}": error for step, error in errors.items()}
        self.passed_on += passed_on

    def add_stage(self, stage: str, other: ErrorStats) -> None:
        """Add what was seen in a further denoising stage."""
        self.errors |= {f"{stage}: {step}": error for step, error in other.errors.items()}
        self.passed_on += other.passed_on

    def as_dict(self) -> dict[str, Any]:
        """The form of the report."""
        errors = {str(step): round(error, 6) for step, error in self.errors.items()}
        return {"tolerance": self.tolerance, "errors": errors, "passed_on": round(self.passed_on, 6)}


@dataclass
class RequestStats:
    """Everything that a request's report says."""

    backend: str
    enabled: bool
    reason: str | None = None
    profile: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    transformers: dict[str, TransformerStats] = field(default_factory=dict)
    denoising_s: float = 0.0
    notes: list[str] = field(default_factory=list)
    refused: bool = False
    corrector: CorrectorStats = field(default_factory=CorrectorStats)
    error_control: ErrorStats | None = None

    def note(self, text: str) -> None:
        """Add a remark once."""
        if text not in self.notes:
            self.notes.append(text)

    def count(self, kind: str) -> int:
        """Denoising steps of the conditional branch over all transformers; ``kind``: computed or cached."""
        return sum(len(getattr(b, kind)) for t in self.transformers.values() for b in self._leading(t))

    @staticmethod
    def _leading(transformer: TransformerStats) -> list[BranchStats]:
        branches = transformer.branches
        cond = [branch for name, branch in branches.items() if name == COND or name.startswith(COND_ONLY)]
        return cond or [*branches.values()][:1]

    def add_stage(self, stage: str, other: RequestStats) -> None:
        """Add what a further denoising stage of the same request did; its transformers are named after it."""
        self.transformers |= {f"{stage}.{name}": each for name, each in other.transformers.items()}
        self.denoising_s += other.denoising_s
        self.refused = self.refused or other.refused
        for note in other.notes:
            self.note(reason_of(note, "other").after(stage))
        if other.enabled and self.enabled:
            self.corrector.add(stage, other.corrector)
        elif other.enabled:
            self.corrector = other.corrector
        if self.error_control is not None and other.error_control is not None:
            self.error_control.add_stage(stage, other.error_control)
        self.error_control = self.error_control or other.error_control
        if other.enabled and not self.enabled:
            first, self.reason, self.enabled = self.reason, None, True
            self.profile, self.config = other.profile, other.config
            if first is not None:
                self.note(first)
        elif other.reason not in (None, self.reason):
            further = reason_of(other.reason, "other").after(stage)
            if self.enabled:
                self.note(further)
            else:
                self.reason = Reason(codes_of([self.reason])[0], f"{self.reason}; {further}")

    def diffs(self) -> list[float]:
        """All measured differences, sorted."""
        return sorted(
            diff
            for transformer in self.transformers.values()
            for branch in transformer.branches.values()
            for diff in branch.residual_diffs.values()
        )

    def as_dict(self) -> dict[str, Any]:
        """The ``cache_dit`` field of answers."""
        return {
            "enabled": self.enabled,
            "reason": self.why(),
            "reason_codes": codes_of(self.reasons()),
            "backend": self.backend,
            "profile": self.profile,
            "config": dict(self.config),
            "computed_steps": self.count("computed"),
            "cached_steps": self.count("cached"),
            "denoising_s": round(self.denoising_s, 4),
            "corrector": asdict(self.corrector) if self.enabled else None,
            "error_control": None if self.error_control is None else self.error_control.as_dict(),
            "transformers": {name: t.as_dict() for name, t in self.transformers.items()},
        }

    def reasons(self) -> list[str]:
        """Why caching is off or limited, each with its code; empty where nothing held it back."""
        if self.reason is not None:
            return [self.reason]
        found = list(self.notes)
        for name, transformer in self.transformers.items():
            notes = (*transformer.notes, *transformer.remarks.values())
            found += [reason_of(note, "branches").after(name) for note in notes]
            if nans := sum(branch.nan_diffs for branch in transformer.branches.values()):
                text = f"{name}: {nans} residual differences were NaN, these steps were computed"
                found.append(Reason("nan_diffs", text))
        return found

    def why(self) -> str | None:
        """The same as one sentence, None where nothing held caching back."""
        return "; ".join(self.reasons()) or None

    def line(self, request: str = "", ended: str = "") -> str:
        """The log line.

        Args:
            request: its id.
            ended: how a request that was not served ended, ``failed`` or ``refused``.
        """
        computed, cached = self.count("computed"), self.count("cached")
        why, codes = self.why(), ", ".join(codes_of(self.reasons()))
        if not self.enabled:
            said = f"{ended or 'off'} [{codes}]: {why}"
        else:
            parts = [ended] if ended else []
            parts += [f"{computed + cached} steps", f"{computed} computed", f"{cached} cached (cond)"]
            if diffs := self.diffs():
                parts.append(f"diffs p50 {percentile(diffs, 50):.2f} p95 {percentile(diffs, 95):.2f}")
            if self.corrector.corrected_steps:
                parts.append(f"{self.corrector.corrected_steps} corrected")
            said = ", ".join([*parts, f"denoising {self.denoising_s:.2f} s"])
            said += f"; limited [{codes}]: {why}" if why else ""
        return one_line(": ".join(filter(None, ["cache-dit", request, said])))


def reports_of(result: Any) -> list[dict[str, Any]]:
    """The reports that a worker attached to its result, one for each output that ran by itself."""
    metrics = getattr(result, "metrics_list", None) or [getattr(result, "metrics", None)]
    return [report for each in metrics if (report := getattr(each, "cache_dit", None)) is not None]


def percentile(ordered: Iterable[float], rank: float) -> float:
    """Nearest-rank percentile of an ascending list; ``rank`` from 0 to 100."""
    values = list(ordered)
    return values[max(0, math.ceil(len(values) * rank / 100) - 1)]
