"""Block hooks: the model's own block loop, with a hook in place of each block.

Loops of real models do more than call their blocks: they hand each block its own keys and values, skip some, add
control residuals in between, carry a third stream. A hook runs its block or hands its inputs on, so the loop stays
the model's own. Decisions and residuals are those of ``branch_cache``.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapters import Blocks
from ..errors import MountError
from .branch_cache import BranchCache, BranchState
from .compiling import no_compile, untraced
from .mount_check import BlockProbe
from .parallel import first_residual, is_respread

Streams = dict[str, Any]
"""Value of each stream by parameter name: a tensor (batch, tokens, dim), or None."""


@dataclass(eq=False)
class _Pass:
    """One run through the hooks; a forward may make several, e.g. one for each sample.

    Args:
        key: the passes of a forward are numbered as they begin, which is the same in each step.
        position: the last hook entered.
        handed_on: the measured stream that the last hook returned; it is not kept alive.
        start: the measured stream before the first block.
        entry: the streams before the first block that may be left out.
        open: between that block and the last one that may be left out.
        outputs: how many values a block returns, None for a bare tensor.
    """

    key: str
    position: int = -1
    handed_on: weakref.ref[torch.Tensor] | None = None
    start: torch.Tensor | None = None
    entry: Streams | None = None
    state: BranchState | None = None
    cached: bool = False
    open: bool = False
    outputs: int | None = None

    def hand_on(self, value: Any) -> None:
        self.handed_on = weakref.ref(value) if isinstance(value, torch.Tensor) else None


class SharedBlockState:
    """What the hooks share over which one decision holds: one block list, or lists that carry the same streams.

    Args:
        blocks: the first of the lists.
        materialize: makes a tensor of a stream that a block handed on unfinished.

    Attributes:
        mixed: whether passes of this forward take turns and nothing tells to which a call belongs; the rest only runs.
    """

    def __init__(
        self, blocks: Blocks, cache: BranchCache, *, materialize: Callable[[Any], torch.Tensor] | None = None
    ):
        self.blocks, self.cache = blocks, cache
        self.size = 0
        self._materialize = materialize
        # A block returns its only stream as it is, be it unfinished.
        self._bare = materialize is not None and len(blocks.streams) == 1
        self._first: nn.Module | None = None
        self.probe: BlockProbe | None = None
        self._passes: list[_Pass] = []
        self.mixed = False

    def reset(self) -> None:
        """Forget the last forward, with the tensors that it holds."""
        self._passes.clear()
        self.mixed = False

    @property
    def problem(self) -> str | None:
        """Why the branch of the forward that has ended cannot be cached, None where it can."""
        if self.mixed:
            return "samples take turns in the blocks and cannot be told apart"
        # No residual was noted, or no forecast used.
        return "the block loop left out its last block" if any(each.open for each in self._passes) else None

    @property
    def lost(self) -> bool:
        """Whether a forecast never reached the output, or may have reached the wrong pass."""
        return any(each.cached and (each.open or self.mixed) for each in self._passes)

    def watch(self, first: int, last: int) -> BlockProbe:
        self.probe = BlockProbe(self.blocks, (first, self.size - last), bare=self._bare)
        return self.probe

    def hook(self, block: nn.Module) -> BlockHook:
        self._first = block if self._first is None else self._first
        self.size += 1
        return BlockHook(self, block, self.size - 1)

    @untraced
    def before(self, hook: BlockHook, args: Any, kwargs: Any) -> tuple[_Pass | None, bool, Any, Any]:
        """(pass, whether the block runs, its arguments); where it does not run, args is its output.

        The pass is None where nothing tells which one it is.
        """
        first, last = self._middle()
        streams, measured = hook.read(args, kwargs), self.blocks.measured
        current = self._pass_of(hook.index, streams[measured])
        if current is None:
            return None, True, args, kwargs
        if current.cached and current.open and hook.index < last - 1:
            # Most hooks of a cached step: nothing to decide, nothing to keep.
            current.position = hook.index
            return current, False, self._hand_on(current, streams), None
        if current.position < 0 < first:
            current.start = self._kept(self._materialized(streams[measured]))
        if first <= hook.index < last and current.entry is None:
            args, kwargs = self._decide(hook, current, streams, args, kwargs)
        elif hook.index >= last and current.open:
            # The loop left out the last block of the middle: what it would have returned comes in here.
            args, kwargs = hook.write(self._close(current, streams), args, kwargs)
        current.position = hook.index
        streams = hook.read(args, kwargs)
        if hook.index < first or hook.index >= last or not current.cached:
            if self.probe is not None:
                self.probe.enter(current.key, hook.index, streams)
            return current, True, args, kwargs
        if hook.index == last - 1:
            streams = self._close(current, streams)
        return current, False, self._hand_on(current, streams), None

    @untraced
    def after(self, hook: BlockHook, current: _Pass | None, output: Any) -> Any:
        """The block's output, noted where it ends the middle."""
        if current is None:
            return output
        if self.probe is not None:
            self.probe.leave(current.key, hook.index, output, respread=is_respread(hook.block))
        bare = self._bare or isinstance(output, torch.Tensor)
        current.outputs = None if bare else len(output)
        streams = dict(zip(self.blocks.streams, (output,) if bare else output, strict=False))
        if hook.index == self._middle()[1] - 1 and current.open:
            return self._hand_on(current, self._close(current, streams), output)
        current.hand_on(streams.get(self.blocks.measured))
        return output

    def _middle(self) -> tuple[int, int]:
        settings = self.cache.request.settings
        return settings.Fn_compute_blocks, self.size - settings.Bn_compute_blocks

    def _pass_of(self, index: int, given: Any) -> _Pass | None:
        """The pass that enters hook ``index`` with ``given``; None, now and until the forward ends, if none is sure.

        A pass enters each hook once, in rising order. Among several that may come here, it is the one whose last
        hook returned what this one is given.
        """
        if self.mixed:
            return None
        ahead = [each for each in self._passes if each.position < index]
        if len(ahead) > 1:
            ahead = [each for each in ahead if given is not None and each.handed_on and each.handed_on() is given]
            self.mixed = len(ahead) != 1
            return None if self.mixed else ahead[0]
        if not ahead:
            number = len(self._passes)
            ahead = [_Pass(key=self.blocks.name if number == 0 else f"{self.blocks.name}#{number}")]
            self._passes += ahead
        return ahead[0]

    def _decide(self, hook: BlockHook, current: _Pass, streams: Streams, args: Any, kwargs: Any) -> tuple[Any, Any]:
        entry = {name: self._materialized(value) for name, value in streams.items()}
        hidden = entry[self.blocks.measured]
        residual = hidden
        # Where the loop ran none of the first blocks there is no residual; the states themselves are compared.
        if current.position >= 0 and current.start is not None:
            residual = first_residual(self._first, current.start, hidden)
        current.state, current.cached = self.cache.decide(current.key, self.blocks.measured, residual)
        current.entry = entry if current.cached else {name: self._kept(value) for name, value in entry.items()}
        current.start, current.open = None, True
        return hook.write(entry, args, kwargs) if self._materialize is not None else (args, kwargs)

    def _close(self, current: _Pass, streams: Streams) -> Streams:
        """End the middle: note its residuals, or forecast its outcome."""
        current.open = False
        entry, state, cache = current.entry, current.state, self.cache
        assert entry is not None and state is not None
        if current.cached:
            residuals = {name: cache.forecast(state, name) for name in self.blocks.streams}
            return {name: _sum(entry[name], residual) for name, residual in residuals.items()}
        streams = {name: self._materialized(value) for name, value in streams.items()}
        for name, value in streams.items():
            cache.note(state, name, value if value is None or entry[name] is None else value - entry[name])
        current.entry = None
        return streams

    def _materialized(self, value: Any) -> Any:
        if value is None or isinstance(value, torch.Tensor):
            return value
        if self._materialize is None:
            raise MountError(f"{self.blocks.name}: a block's states are {type(value).__name__}, expected a tensor")
        return self._materialize(value)

    def _kept(self, value: Any) -> Any:
        return value.clone() if self.blocks.in_place and isinstance(value, torch.Tensor) else value

    def _hand_on(self, current: _Pass, streams: Streams, like: Any = None) -> Any:
        """What a block returns for ``streams``; further values are those of ``like``, or None."""
        current.hand_on(streams[self.blocks.measured])
        values = [streams[name] for name in self.blocks.streams]
        if current.outputs is None and len(values) == 1:
            return values[0]
        rest = [None] * ((current.outputs or 0) - len(values)) if like is None else like[len(values) :]
        return (*values, *rest)


def _sum(entry: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor | None:
    return residual if entry is None or residual is None else entry + residual


class BlockHook(nn.Module):
    """In place of one block: runs it or leaves it out.

    Everything else that the loop asks of the block is the block's.

    Raises:
        MountError: the block does not take the streams.
    """

    def __init__(self, shared: SharedBlockState, block: nn.Module, index: int):
        super().__init__()
        # Not registered: the block stays a submodule of its transformer alone.
        self.__dict__["block"] = block
        self.shared, self.index = shared, index
        if not fits(block, shared.blocks):
            raise MountError(f"{type(block).__name__} does not take {', '.join(shared.blocks.streams)}")
        # Streams that only keywords reach have no index.
        names = positional(block)
        self._indices = {name: names.index(name) for name in shared.blocks.streams if name in names}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    # The block under it is compiled where the host compiles; the decision is not.
    @no_compile
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's own; values are the block's, or the inputs handed on."""
        current, runs, args, kwargs = self.shared.before(self, args, kwargs)
        if not runs:
            return args
        return self.shared.after(self, current, self.block(*args, **kwargs))

    def read(self, args: Any, kwargs: Mapping[str, Any]) -> Streams:
        found: Streams = {}
        for name in self.shared.blocks.streams:
            index = self._indices.get(name, len(args))
            found[name] = kwargs[name] if name in kwargs else args[index] if index < len(args) else None
        return found

    def write(self, streams: Streams, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """The call with other values for the streams."""
        args, kwargs = list(args), dict(kwargs)
        for name, value in streams.items():
            index = self._indices.get(name, len(args))
            if name not in kwargs and index < len(args):
                args[index] = value
            elif name not in self.shared.blocks.returned:
                kwargs[name] = value
        return tuple(args), kwargs


def fits(block: nn.Module, blocks: Blocks) -> bool:
    parameters = inspect.signature(block.forward).parameters.values()
    missing = set(blocks.streams) - set(blocks.returned) - {each.name for each in parameters}
    return not missing or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)


def positional(block: nn.Module) -> list[str]:
    """Parameters of a block's forward that take positional arguments, in their order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [each.name for each in inspect.signature(block.forward).parameters.values() if each.kind in kinds]
