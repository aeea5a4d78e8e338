"""The form of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Cfg = Literal["none", "separate", "batched", "paired"]

Ability = Literal["blocks", "output", "none"]
"""What of a class can be left out: its middle blocks, only the whole forward, or nothing."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """One list of blocks.

    The model's own loop is kept; a hook in place of each block may leave it out.

    Args:
        name: attribute path of the list in the transformer, e.g. ``double_blocks`` or ``model.layers``.
        streams: parameters of the block's forward that each block returns anew, in the order of its outputs.
        measured: which of ``streams`` the decision looks at; by default ``hidden_states`` or, without it, the first.
        returned: those of ``streams`` that the blocks return and do not take.
        shares_decision: the list carries the streams of the one before: one decision holds for both.
        in_place: the blocks write into their inputs.
        materialize: function of the class's own module that makes a tensor of a stream that a block handed on
            unfinished.
        mirrored: the last blocks take what the first ones made, so B may not exceed F.

    A list may be described more than once, for variants of a class: the first that fits its blocks is taken.
    """

    name: str
    streams: tuple[str, ...]
    measured: str = ""
    returned: tuple[str, ...] = ()
    shares_decision: bool = False
    in_place: bool = False
    materialize: str = ""
    mirrored: bool = False

    def __post_init__(self) -> None:
        if not self.measured:
            default = "hidden_states" if "hidden_states" in self.streams else self.streams[0]
            object.__setattr__(self, "measured", default)
        if self.measured not in self.streams:
            raise ValueError(f"{self.name}: {self.measured} is none of its streams")


@dataclass(frozen=True, kw_only=True)
class ModelAdapter:
    """One model class.

    Args:
        family: name of the model family, for people.
        blocks: its block lists, in the order in which they run; empty where no list can be cached.
        transformers: how many transformers of this class a pipeline may have.
        cfg: how guidance runs: ``none`` (distilled guidance or none), ``separate`` (one forward a branch),
            ``batched`` (one forward for all branches), ``paired`` (a transformer for each branch).
        note: remark for docs/models.md.
        output_only: why the middle blocks cannot be left out. The whole output can still be forecast.
        unsupported: why nothing can be left out.
        verified: how the tests know: ``run`` (built tiny and run on the CPU), ``structure`` (block lists and
            signatures looked at on the meta device), None (not tested).
    """

    family: str
    blocks: tuple[Blocks, ...] = ()
    transformers: int = 1
    cfg: Cfg = "separate"
    note: str = ""
    output_only: str = ""
    unsupported: str = ""
    verified: Literal["run", "structure"] | None = None

    def __post_init__(self) -> None:
        if sum(map(bool, (self.blocks, self.output_only, self.unsupported))) != 1:
            raise ValueError(f"{self.family}: block lists, or why there are none, one of the two")

    @property
    def ability(self) -> Ability:
        """What of the class can be left out."""
        if self.blocks:
            return "blocks"
        return "output" if self.output_only else "none"

    def describe(self) -> str:
        """One line for people: what is cached, or why not."""
        if self.blocks:
            return f"{self.family}: caches {', '.join(each.name for each in self.blocks)}"
        if self.output_only:
            return f"{self.family}: only forecast: output, blocks are not cached: {self.output_only}"
        return f"{self.family}: not cached: {self.unsupported}"
