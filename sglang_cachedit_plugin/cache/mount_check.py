"""The mount probe: what is said of a model's blocks, checked on the first real forward.

The first forward of a request is always computed, so it can be looked at without changing anything. For each
block list the probe checks that every block runs once and in order, returns what is declared in the shapes it was
given, and that nothing overwrites the tensors from which residuals are made: a block that writes into its input
turns every residual into zero or NaN, and cached pictures into noise.

Nothing waits for a GPU: what only the GPU knows is collected there and read when the request ends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..adapters import Blocks
from ..errors import MountError
from .compiling import no_compile, untraced

STRUCTURAL = (MountError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""What hooked blocks raise where a model's blocks are not as declared."""


def _version(tensor: torch.Tensor) -> int | None:
    """The tensor's count of writes; None for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version


def _widened(value: torch.Tensor, returned: torch.Tensor) -> bool:
    """Whether the shape is the same, or a dimension of 1 was broadcast: one prompt's text for several pictures."""
    old, new = value.shape, returned.shape
    return len(old) == len(new) and all(a in (1, b) for a, b in zip(old, new, strict=True))


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
        return isinstance(output, torch.Tensor) and output.data_ptr() == self._tensor.data_ptr() != 0


class BlockProbe:
    """Watches one forward through the blocks over which one decision holds.

    Args:
        blocks: what is said of them; where they write into their inputs, what is kept of those is a copy.
        middle: first block that may be left out, and the first one after those.
        bare: a block returns its only stream as it is, which may be something else than a tensor.

    Attributes:
        flags: what must not be true, with tensors of one element that say whether it is.
    """

    def __init__(self, blocks: Blocks, middle: tuple[int, int], *, bare: bool = False):
        self._blocks, self._middle, self._bare = blocks, middle, bare
        self._last: int | None = None
        # By pass: the loop may run several times in a forward, e.g. for groups of prompts.
        self._start: dict[str, dict[str, _Kept]] = {}
        self._entry: defaultdict[str, dict[str, _Kept]] = defaultdict(dict)
        self._inputs: dict[str, tuple[torch.Tensor, int | None]] = {}
        self.problem: str | None = None
        self.flags: list[tuple[str, torch.Tensor]] = []

    @untraced
    def enter(self, key: str, index: int, streams: Mapping[str, Any]) -> None:
        """Block ``index`` is called with ``streams`` in the pass ``key``."""
        if key not in self._start:
            if index != 0:
                self._blame(f"block {index} runs " + ("first" if self._last is None else f"after block {self._last}"))
            self._start[key] = {}
        self._last = index
        tensors = {name: value for name, value in streams.items() if isinstance(value, torch.Tensor)}
        self._inputs = {name: (value, _version(value)) for name, value in tensors.items()}
        if self._blocks.in_place:
            return
        first, last = self._middle
        measured = self._blocks.measured
        if index == first < last:
            self._judge(self._start[key], "what the first block was given", tensors)
            self._start[key] = {}
            self._entry[key] = {name: _Kept(value) for name, value in tensors.items()}
        elif index == 0 and measured in tensors:
            self._start[key] = {measured: _Kept(tensors[measured])}

    @untraced
    def leave(self, key: str, index: int, output: Any, *, respread: bool = False) -> None:
        """Block ``index`` returned ``output``.

        Args:
            respread: hooks around the block split or gather the sequence over ranks.
        """
        names = self._blocks.streams
        values = output if isinstance(output, tuple | list) and not self._bare else (output,)
        if len(values) < len(names):
            self._blame(f"block {index} returns {len(values)} of {', '.join(names)}")
            return
        outputs = dict(zip(names, values, strict=False))
        for name, (value, version) in self._inputs.items():
            returned = outputs.get(name)
            if isinstance(returned, torch.Tensor) and not _widened(value, returned) and not respread:
                self._blame(f"block {index} makes {tuple(returned.shape)} of {name} {tuple(value.shape)}")
            if _version(value) != version and not self._blocks.in_place:
                self._blame(f"block {index} overwrites its input {name}")
        if index == self._middle[1] - 1:
            self._judge(self._entry.pop(key, {}), "what the first block that may be left out was given", outputs)
        self._inputs = {}

    def _judge(self, kept: Mapping[str, _Kept], what: str, now: Mapping[str, Any]) -> None:
        for name, each in kept.items():
            overwritten = each.overwritten()
            text = f"{what} ({name}) is overwritten before its residual is made"
            if isinstance(overwritten, torch.Tensor):
                self.flags.append((f"{self._blocks.name}: {text}", overwritten))
            elif overwritten:
                self._blame(text)
            if name == self._blocks.measured and each.returned_as(now.get(name)):
                self._blame(f"{what} ({name}) is returned in its own place, so its residual would be zero")

    def finish(self) -> str | None:
        """The forward is over; what was wrong, None for nothing."""
        if self._last is None:
            self._blame("none of its blocks ran")
        return self.problem

    def _blame(self, problem: str) -> None:
        self.problem = self.problem or f"{self._blocks.name}: {problem}"


class MountProbe:
    """What is known of one mounted transformer.

    Args:
        watched: (F, B) -> the probes of all its blocks, watching for the length of the context.
    """

    def __init__(self, watched: Callable[[int, int], AbstractContextManager[list[BlockProbe]]]):
        self._watched = watched
        self._passed: set[tuple[int, int]] = set()
        self._flags: list[tuple[str, torch.Tensor]] = []
        self._failures = 0
        self.problem: str | None = None

    def another_try(self) -> None:
        """A request begins: a forward that failed for no reason that the probe saw may be looked at once more."""
        if self._failures == 1:
            self.problem = None

    def due(self, first: int, last: int) -> bool:
        """Whether a forward with these numbers of first and last blocks was not looked at yet."""
        return self.problem is None and (first, last) not in self._passed

    @no_compile
    def run(
        self, first: int, last: int, forward: Callable[[], Any], original: Callable[[], Any], *, recover: bool = True
    ) -> Any:
        """The output of ``forward``, or of ``original`` where that fails; ``problem`` then says what is wrong.

        Args:
            recover: False where other ranks wait for what comes within ``forward``: it fails.
        """
        probes: list[BlockProbe] = []
        try:
            with self._watched(first, last) as probes:
                output = forward()
        except Exception as error:
            # What is out of memory or a broken link comes from no description.
            if not recover or not (isinstance(error, STRUCTURAL) or type(error) is RuntimeError):
                raise
            output = original()
            # The model alone could do it: the fault is the description's. Unless nothing was seen to be wrong and
            # it does not happen again, such as an error of the machine.
            seen = next((each.problem for each in probes if each.problem is not None), None)
            self._failures = 2 if seen else self._failures + 1
            self.problem = seen or f"its blocks are not as declared: {type(error).__name__}: {error}"
            return output
        self._failures = 0
        self._passed.add((first, last))
        self._flags += [flag for each in probes for flag in each.flags]
        self.problem = next((found for each in probes if (found := each.finish()) is not None), None)
        # Computed blocks are the model's own, so the output is right. It is not run again: its inputs may be changed.
        return output

    def found_elsewhere(self, first: int, last: int, problem: str | None) -> None:
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
