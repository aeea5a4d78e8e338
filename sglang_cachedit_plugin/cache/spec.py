"""What a request wants of the transformers of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config.settings import CacheSettings
from ..report.stats import RequestStats
from .step_plan import StepPlan


@dataclass(frozen=True)
class Identity:
    """Which forward this is: the host's branch name and step number."""

    branch: str
    step: int


Identify = Callable[[str, Mapping[str, Any]], Identity | None]
"""(transformer name, keyword arguments of the forward) -> identity, None where the host names none."""

OnForward = Callable[[str, Identity, Any, Any], None]
"""Told of each computed forward: transformer name, identity, latents that went in, output."""


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Process groups of the ranks that take part in one request.

    Args:
        forward: ranks that share one forward, or one joint decision; None for a single rank.
        cfg_group: these and the ranks that run the other CFG branches at the same time; None where branches
            take turns.
        cfg_rank: this rank's place among the CFG ranks, of ``cfg_ranks``.
        gathered: the ranks of ``cfg_group`` gather each block's weights from one another (FSDP): all of them run
            a block or none does.
        sp_rank: this rank's place among those that hold the sequence, of ``sp_ranks`` equal shards.
        tokens: tokens of the whole sequence without padding, None where the host does not say.
    """

    forward: Any = None
    cfg_group: Any = None
    cfg_rank: int = 0
    cfg_ranks: int = 1
    gathered: bool = False
    sp_rank: int = 0
    sp_ranks: int = 1
    tokens: int | None = None

    def couple(self, settings: CacheSettings) -> bool:
        """Whether CFG ranks decide together, each on a forward of its own."""
        if self.cfg_group is None or self.cfg_group is self.forward:
            return False
        return self.gathered or settings.lockstep or not settings.cfg_diff_compute_separate

    def real_tokens(self, local: int) -> int:
        """How many of the ``local`` tokens on this rank are real: the host pads the end of the sequence."""
        if self.tokens is None or not 0 < local * self.sp_ranks - self.tokens < self.sp_ranks:
            return local
        return max(0, min(local, self.tokens - self.sp_rank * local))


@dataclass(frozen=True, kw_only=True)
class TransformerSpec:
    """What a request wants of one transformer.

    Args:
        name: ``transformer`` or ``transformer_2``.
        settings: the settings in force.
        plan: the decision for each of its own steps.
        first_step: the host's number of its first step (the low-noise expert starts late).
        timesteps: of each of the host's steps, or their sigmas; None: the numbers of the steps.
        uncond_plan: the plan of the unconditional branch, where it has its own.
        weights: for each of the host's steps that ``plan`` caches, what the last computed outputs count, oldest
            first; empty: those of the extrapolation. They do not hold for a branch with a plan of its own.
    """

    name: str
    settings: CacheSettings
    plan: StepPlan
    first_step: int = 0
    timesteps: Sequence[float] | None = None
    uncond_plan: StepPlan | None = None
    weights: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    def plan_of(self, branch: str) -> StepPlan:
        """The plan of a CFG branch."""
        return self.uncond_plan if branch == "uncond" and self.uncond_plan is not None else self.plan

    def weights_of(self, branch: str, step: int) -> tuple[float, ...] | None:
        """The weights of a CFG branch at the host's step ``step``; None: those of the extrapolation."""
        return self.weights.get(step) if self.plan_of(branch) is self.plan else None

    def position(self, step: int) -> float:
        """Place of the host's step ``step`` on the denoising path."""
        if self.timesteps is None or not 0 <= step < len(self.timesteps):
            return float(step)
        return self.timesteps[step]


@dataclass(frozen=True, kw_only=True)
class RequestSpec:
    """All that a request wants of the transformers of a model.

    Args:
        transformers: those that are cached; the others run as they are.
        stats: the record of what they do.
        identify: names each forward.
        groups: the ranks that take part.
        around: forwards run as they are, and what is cached is cached around what the host makes of them (CUDA
            graphs); see ``CachedTransformer.run_around``.
        warmup: runs before each forward with the transformer, the identity and the forward's arguments.
        on_forward: told of each computed forward.
    """

    transformers: tuple[TransformerSpec, ...]
    stats: RequestStats
    identify: Identify
    groups: Groups = field(default_factory=Groups)
    around: bool = False
    warmup: Callable[[Any, Identity, Any, dict[str, Any]], None] | None = None
    on_forward: OnForward | None = None

    def of(self, name: str) -> TransformerSpec | None:
        """What is wanted of the transformer ``name``, None where it runs as it is."""
        return next((each for each in self.transformers if each.name == name), None)
