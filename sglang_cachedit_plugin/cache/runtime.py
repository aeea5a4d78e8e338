"""What is mounted against what a request wants: one transition, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from ..config.settings import CacheSettings
from ..errors import MountError
from .step_plan import StepPlan


@dataclass(frozen=True)
class Identity:
    """Which forward this is: the host's branch name and step number."""

    branch: str
    step: int


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Process groups of the ranks that take part in one request.

    Args:
        forward: ranks that share one forward, or one joint decision; None for a single rank.
        pair: these and the ranks that run the other CFG branches at the same time; None where branches
            take turns.
        row: this rank's place among the CFG ranks, of ``rows``.
        gathered: the ranks of ``pair`` gather each block's weights from one another (FSDP): all of them run a block
            or none does.
        shard: this rank's place among those that hold the sequence, of ``shards`` equal shards.
        tokens: tokens of the whole sequence without padding, None where the host does not say.
    """

    forward: Any = None
    pair: Any = None
    row: int = 0
    rows: int = 1
    gathered: bool = False
    shard: int = 0
    shards: int = 1
    tokens: int | None = None

    def couple(self, settings: CacheSettings) -> bool:
        """Whether CFG ranks decide together, each on a forward of its own."""
        if self.pair is None or self.pair is self.forward:
            return False
        return self.gathered or settings.lockstep or not settings.cfg_diff_compute_separate

    def real_tokens(self, local: int) -> int:
        """How many of the ``local`` tokens on this rank are real: the host pads the end of the sequence."""
        padding = 0 if self.tokens is None else local * self.shards - self.tokens
        if not 0 < padding < self.shards:
            return local
        return max(0, min(local, self.tokens - self.shard * local))


@dataclass(frozen=True, kw_only=True)
class TransformerSpec:
    """What a request wants of one transformer.

    Args:
        name: ``transformer`` or ``transformer_2``.
        settings: the settings in force.
        plan: the decision for each of its own steps.
        first_step: the host's number of its first step (the low-noise expert starts late).
        positions: place of each of the host's steps on the denoising path (timestep or sigma); None:
            their numbers.
        uncond_plan: the plan of the unconditional branch, where it has its own.
        weights: for each of the host's steps that ``plan`` caches, what the last computed outputs count, oldest
            first; empty: those of the extrapolation. They do not hold for a branch with a plan of its own.
    """

    name: str
    settings: CacheSettings
    plan: StepPlan
    first_step: int = 0
    positions: Sequence[float] | None = None
    uncond_plan: StepPlan | None = None
    weights: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    def plan_of(self, branch: str) -> StepPlan:
        """The plan of a CFG branch."""
        return self.uncond_plan if branch == "uncond" and self.uncond_plan is not None else self.plan

    def weights_of(self, branch: str, step: int) -> tuple[float, ...] | None:
        """The weights of a CFG branch at the host's step ``step``; None: those of the extrapolation."""
        return self.weights.get(step) if self.plan_of(branch) is self.plan else None

    def position(self, step: int) -> float:
        """Place of the host's step ``step``."""
        if self.positions is None or not 0 <= step < len(self.positions):
            return float(step)
        return self.positions[step]


@dataclass(frozen=True, kw_only=True)
class RequestSpec:
    """What a request wants of all transformers of a model."""

    transformers: tuple[TransformerSpec, ...]


class Backend(Protocol):
    """The hands of the runtime: what can be done to the transformers of one model."""

    def mount(self) -> None:
        """Prepare the transformers once; raises MountError and leaves them untouched."""

    def refresh(self, spec: RequestSpec) -> None:
        """Empty contexts with the settings of ``spec``; raises MountError for settings that do not fit."""

    def bypass(self) -> None:
        """Run the original forward; frees all buffers."""


class State(Enum):
    """Where a model stands."""

    UNMOUNTED = "unmounted"
    BYPASSED = "bypassed"
    ACTIVE = "active"
    UNMOUNTABLE = "unmountable"


class Runtime:
    """Brings one model from what it is to what the next request wants."""

    def __init__(self, backend: Backend):
        self._backend = backend
        self.state = State.UNMOUNTED
        self.reason: str | None = None

    def mount(self) -> None:
        """Mount if not yet tried; afterwards the original forward still runs."""
        if self.state is State.UNMOUNTED:
            try:
                self._backend.mount()
            except MountError as error:
                self.state, self.reason = State.UNMOUNTABLE, str(error)
                raise
            self.state = State.BYPASSED

    def prepare(self, spec: RequestSpec | None) -> None:
        """Make the single transition to ``spec``, or to the original forward for None.

        Raises:
            MountError: the model or the settings cannot be served cached; the original forward runs.
        """
        if spec is None:
            if self.state is State.ACTIVE:
                self._to_bypass()
            return
        if self.state is State.UNMOUNTABLE:
            raise MountError(self.reason or "the model cannot be cached")
        self.mount()
        try:
            self._backend.refresh(spec)
        except BaseException:
            # Some transformers may have been refreshed already: no request runs half cached.
            self._to_bypass()
            raise
        self.state = State.ACTIVE

    def _to_bypass(self) -> None:
        self._backend.bypass()
        self.state = State.BYPASSED
