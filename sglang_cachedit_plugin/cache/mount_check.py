"""The mount probe: what a row says of a model's blocks, checked on the first real forward.

The first forward of a request is always computed, so it can be looked at without changing anything. For each
chain of blocks the probe checks that every block runs once and in order, returns what is declared in the shapes
it was given, and that nothing overwrites the tensors from which residuals are made: a block that writes into its
input turns every residual into zero or NaN, and cached pictures into noise.

Nothing waits for a GPU: what only the GPU knows is collected there and read when the request ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import MountError
from .compiling import no_compile
from .sequence_parallel import is_respread

Streams = Mapping[str, Any]
STRUCTURAL = (MountError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""What cached blocks raise where a model's blocks are not as declared."""


def is_structural(error: Exception) -> bool:
    """Whether an error may come from a wrong description; what is out of memory or a broken link does not."""
    return isinstance(error, STRUCTURAL) or type(error) is RuntimeError


def _version(tensor: torch.Tensor) -> int | None:
    """The tensor's count of writes; None for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version


def _widened(value: torch.Tensor, returned: torch.Tensor) -> bool:
    """Whether the shape is the same, or a dimension of 1 was broadcast: one prompt's text for several pictures."""
    same_rank = value.dim() == returned.dim()
    return same_rank and all(old in (1, new) for old, new in zip(value.shape, returned.shape, strict=True))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Sums of the last dimension's bit patterns: what any write changes, at a thousandth of the tensor's size."""
    # What is spread over ranks is looked at where it lies.
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    patterns = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor if tensor.element_size() not in patterns else tensor.view(patterns[tensor.element_size()])
    return bits.sum(-1, dtype=torch.int64)


class _Kept:
    """A tensor from which a residual will be made, and what tells whether it was overwritten."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor, self._version, self._seen = tensor, _version(tensor), _bits(tensor)

    def overwritten(self) -> bool | torch.Tensor:
        """Whether it was; on a GPU, kernels that hide their writes are told by a flag that stays there."""
        if _version(self._tensor) != self._version:
            return True
        changed = (_bits(self._tensor) != self._seen).any()
        return bool(changed) if changed.device.type == "cpu" else changed

    def returned_as(self, output: Any) -> bool:
        """Whether ``output`` lies where the kept tensor lies."""
        return isinstance(output, torch.Tensor) and output.data_ptr() == self._tensor.data_ptr() != 0


@dataclass
class _Round:
    """One run of the loop; a forward may make several, e.g. for groups of prompts."""

    position: int = -1
    start: dict[str, _Kept] = field(default_factory=dict)
    entry: dict[str, _Kept] = field(default_factory=dict)


class ChainProbe:
    """Watches one forward through one chain of blocks.

    Args:
        name: of the block list.
        size: number of its blocks.
        middle: first block that may be left out, and the first one after those.
        streams: what each block takes and returns anew, in the order of its outputs.
        measured: the stream whose residual is compared.
        in_place: the row says that blocks write into their inputs; what is kept of them is a copy.
        settles: a block may hand a stream on unfinished, as something else than a tensor.
    """

    def __init__(
        self, name: str, size: int, middle: tuple[int, int], streams: tuple[str, ...], measured: str,
        *, in_place: bool = False, materializes: bool = False,
    ):
        self.name, self._size, self._middle = name, size, middle
        self._streams, self._measured, self._overwrites = streams, measured, in_place
        self._alone = materializes and len(streams) == 1
        self._rounds: list[_Round] = []
        self._round = _Round()
        self._inputs: dict[str, tuple[torch.Tensor, int | None]] = {}
        self.problem: str | None = None
        self.flags: list[tuple[str, torch.Tensor]] = []

    @torch.compiler.disable
    def enter(self, index: int, streams: Streams) -> None:
        """Block ``index`` is called with ``streams``."""
        self._round = self._round_at(index)
        self._round.position = index
        tensors = {name: value for name, value in streams.items() if isinstance(value, torch.Tensor)}
        self._inputs = {name: (value, _version(value)) for name, value in tensors.items()}
        if self._overwrites:
            return
        first, last = self._middle
        if index == first < last:
            self._judge(self._round.start, "what the first block was given", tensors)
            self._round.start = {}
            self._round.entry = {name: _Kept(value) for name, value in tensors.items()}
        elif index == 0 and self._measured in tensors:
            self._round.start = {self._measured: _Kept(tensors[self._measured])}

    def _round_at(self, index: int) -> _Round:
        for each in self._rounds:
            if each.position < index:
                return each
        if index != 0:
            before = f" after block {self._round.position}" if self._rounds else " first"
            self._blame(f"block {index} runs{before}")
        self._rounds.append(_Round())
        return self._rounds[-1]

    @torch.compiler.disable
    def leave(self, index: int, output: Any, *, respread: bool = False) -> None:
        """Block ``index`` returned ``output``.

        Args:
            respread: hooks around the block split or gather the sequence over ranks.
        """
        values = output if isinstance(output, tuple | list) and not self._alone else (output,)
        if len(values) < len(self._streams):
            self._blame(f"block {index} returns {len(values)} of {', '.join(self._streams)}")
            return
        outputs = dict(zip(self._streams, values, strict=False))
        for name, (value, version) in self._inputs.items():
            returned = outputs.get(name)
            if isinstance(returned, torch.Tensor) and not _widened(value, returned) and not respread:
                self._blame(f"block {index} makes {tuple(returned.shape)} of {name} {tuple(value.shape)}")
            if _version(value) != version and not self._overwrites:
                self._blame(f"block {index} overwrites its input {name}")
        if index == self._middle[1] - 1:
            self._judge(self._round.entry, "what the first block that may be left out was given", outputs)
            self._round.entry = {}
        self._inputs = {}

    def _judge(self, kept: Mapping[str, _Kept], what: str, now: Streams) -> None:
        for name, each in kept.items():
            overwritten = each.overwritten()
            text = f"{what} ({name}) is overwritten before its residual is made"
            if isinstance(overwritten, torch.Tensor):
                self.flags.append((f"{self.name}: {text}", overwritten))
            elif overwritten:
                self._blame(text)
            if name == self._measured and each.returned_as(now.get(name)):
                self._blame(f"{what} ({name}) is returned in its own place, so its residual would be zero")

    def finish(self) -> str | None:
        """The forward is over; what was wrong, None for nothing."""
        if not self._rounds:
            self._blame("none of its blocks ran")
        return None if self.problem is None else f"{self.name}: {self.problem}"

    def _blame(self, problem: str) -> None:
        self.problem = self.problem or problem


class _Watched(nn.Module):
    """A block of a list that stands in for the loop, with the probe around it."""

    def __init__(self, probe: ChainProbe, block: nn.Module, index: int, taken: tuple[str, ...]):
        super().__init__()
        self.__dict__["block"] = block
        self._probe, self._index, self._taken = probe, index, taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    @no_compile
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's own."""
        self._probe.enter(self._index, dict(zip(self._taken, args, strict=False)))
        output = self.block(*args, **kwargs)
        self._probe.leave(self._index, output, respread=is_respread(self.block))
        return output


@contextmanager
def watch_list(stand_in: Any, probe: ChainProbe) -> Iterator[None]:
    """Watch the blocks of one of cache-dit's cached lists inside."""
    own, taken = stand_in.transformer_blocks, stand_in.forward_pattern.In
    stand_in.transformer_blocks = nn.ModuleList(
        _Watched(probe, block, index, taken) for index, block in enumerate(own)
    )
    try:
        yield
    finally:
        stand_in.transformer_blocks = own


class MountProbe:
    """What is known of one mounted transformer.

    Args:
        watched: (F, B) -> the probes of all chains, watching for the length of the context.
    """

    def __init__(self, watched: Callable[[int, int], Any]):
        self._watched = watched
        self._passed: set[tuple[int, int]] = set()
        self._flags: list[tuple[str, torch.Tensor]] = []
        self._failures = 0
        self.problem: str | None = None

    def another_try(self) -> None:
        """A request begins: a forward that failed for no reason that the probe saw may be looked at once more."""
        if self._failures == 1 and self.problem is not None:
            self.problem = None

    def due(self, first: int, last: int) -> bool:
        """Whether a forward with these first and last blocks was not looked at yet."""
        return self.problem is None and (first, last) not in self._passed

    @no_compile
    def run(
        self, first: int, last: int, forward: Callable[[], Any], original: Callable[[], Any], *, recover: bool = True
    ) -> Any:
        """The output of ``forward``, or of ``original`` where that fails; ``problem`` then says what is wrong.

        Args:
            recover: False where other ranks wait for what comes within ``forward``: it fails.
        """
        chains: list[ChainProbe] = []
        try:
            with self._watched(first, last) as chains:
                output = forward()
        except Exception as error:
            if not recover or not is_structural(error):
                raise
            output = original()
            # The model alone could do it: the fault is the description's. Unless nothing was seen to be wrong and
            # it does not happen again, such as an error of the machine.
            seen = next((f"{each.name}: {each.problem}" for each in chains if each.problem is not None), None)
            self._failures = 2 if seen else self._failures + 1
            self.problem = seen or f"its blocks are not as declared: {type(error).__name__}: {error}"
            return output
        self._failures = 0
        self._passed.add((first, last))
        self._flags += [flag for each in chains for flag in each.flags]
        self.problem = next((found for each in chains if (found := each.finish()) is not None), None)
        # Computed blocks are the model's own, so the output is right. It is not run again: its inputs may be changed.
        return output

    def found_elsewhere(self, first: int, last: int, problem: str) -> None:
        """Another rank found ``problem`` in the forward that passed here."""
        self._passed.discard((first, last))
        self._failures, self.problem = 1, problem

    def verdict(self) -> str | None:
        """What is wrong, once the device has nothing left to do."""
        for text, flag in self._flags:
            if self.problem is None and bool(flag):
                self.problem = text
        self._flags.clear()
        return self.problem
