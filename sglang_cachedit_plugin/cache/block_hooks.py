"""Gates: the model's own block loop, with a gate in place of each block.

cache-dit lets one cached list stand in for a whole loop. That fits loops which only call their blocks, all
with the same other arguments. Many of SGLang's models do more: they hand each block its own keys and values,
skip some, add control residuals in between, carry a third stream. A gate runs its block or hands its inputs
on, so the loop stays the model's own. Decisions, buffers and forecasts are those of ``contexts``.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import MountError
from .compiling import no_compile
from .contexts import BranchContexts
from .mount_check import ChainProbe
from .sequence_parallel import first_residual, is_respread

Streams = dict[str, Any]
"""Value of each stream by parameter name: a tensor (batch, tokens, dim), or None."""


@dataclass
class _Pass:
    """One run through the gates of a chain; a forward may make several, e.g. one for each sample.

    Args:
        key: name of the context. The passes of a forward are numbered as they begin, which is the same in each step.
        position: the last gate entered.
        handed_on: the measured stream that the last gate returned.
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
    cached: bool = False
    open: bool = False
    outputs: int | None = None

    def handed(self, value: Any) -> None:
        """The last gate returned ``value``, which is not kept alive."""
        self.handed_on = weakref.ref(value) if isinstance(value, torch.Tensor) else None

    def returned(self, value: Any) -> bool:
        """Whether ``value`` is the tensor that the last gate returned."""
        return value is not None and self.handed_on is not None and self.handed_on() is value


class Chain:
    """The gates over which one decision holds: those of one block list, or of lists that carry the same streams.

    Args:
        name: of its contexts.
        streams: parameters that each block returns anew, in the order of its outputs.
        measured: the stream whose residual is compared.
        copies: the blocks overwrite their inputs, so what is kept of them must be a copy.
        materialize: makes a tensor of a stream that a block handed on unfinished.
    """

    def __init__(
        self,
        name: str,
        contexts: BranchContexts,
        streams: tuple[str, ...],
        measured: str,
        *,
        copies: bool = False,
        materialize: Callable[[Any], torch.Tensor] | None = None,
    ):
        self.name, self.contexts = name, contexts
        self.streams, self.measured = streams, measured
        self.size = 0
        self._copies, self._settle = copies, materialize
        self._first: nn.Module | None = None
        self.probe: ChainProbe | None = None
        self._passes: list[_Pass] = []
        self.mixed = False
        """Whether passes of this forward take turns and nothing tells to which a call belongs; the rest only runs."""

    def reset(self) -> None:
        """Forget the passes of the last forward, with the tensors they hold."""
        self._passes.clear()
        self.mixed = False

    @property
    def unfinished(self) -> bool:
        """Whether a pass ended before the last gate of its middle: no residual was noted, or no forecast used."""
        return any(each.open for each in self._passes)

    @property
    def lost(self) -> bool:
        """Whether a forecast never reached the output, or may have reached the wrong pass."""
        return any(each.cached and (each.open or self.mixed) for each in self._passes)

    def watch(self, first: int, last: int) -> ChainProbe:
        """A probe of the next forward with these first and last blocks."""
        self.probe = ChainProbe(
            self.name, self.size, (first, self.size - last), self.streams, self.measured, in_place=self._copies,
            materializes=self._settle is not None,
        )
        return self.probe

    def gate(self, block: nn.Module) -> Gate:
        """The gate of the next block."""
        if self._first is None:
            self._first = block
        gate = Gate(self, block, self.size)
        self.size += 1
        return gate

    @torch.compiler.disable
    def before(self, gate: Gate, args: Any, kwargs: Any) -> tuple[_Pass | None, bool, Any, Any]:
        """(pass, whether the block runs, its arguments); where it does not run, args is its output.

        The pass is None where nothing tells which one it is.
        """
        first, last = self._middle()
        streams = {name: gate.read(name, args, kwargs) for name in self.streams}
        current = self._pass_of(gate.index, streams[self.measured])
        if current is None:
            return None, True, args, kwargs
        if current.cached and current.open and gate.index < last - 1:
            # Most gates of a cached step: nothing to decide, nothing to keep.
            current.position = gate.index
            return current, False, self._hand_on(current, streams), None
        if current.position < 0 < first:
            current.start = self._kept(self._settled(streams[self.measured]))
        if first <= gate.index < last and current.entry is None:
            args, kwargs = self._decide(gate, current, streams, args, kwargs)
        elif gate.index >= last and current.open:
            # The loop left out the last block of the middle: what it would have returned comes in here.
            args, kwargs = gate.write(self._close(current, streams), args, kwargs)
        current.position = gate.index
        streams = {name: gate.read(name, args, kwargs) for name in self.streams}
        if gate.index < first or gate.index >= last or not current.cached:
            if self.probe is not None:
                self.probe.enter(gate.index, streams)
            return current, True, args, kwargs
        if gate.index == last - 1:
            streams = self._close(current, streams)
        return current, False, self._hand_on(current, streams), None

    @torch.compiler.disable
    def after(self, gate: Gate, current: _Pass | None, output: Any) -> Any:
        """The block's output, noted where it ends the middle."""
        if current is None:
            return output
        if self.probe is not None:
            self.probe.leave(gate.index, output, respread=is_respread(gate.block))
        current.outputs = None if self._is_bare(output) else len(output)
        streams = self._unpacked(output)
        if gate.index == self._middle()[1] - 1 and current.open:
            return self._hand_on(current, self._close(current, streams), output)
        current.handed(streams.get(self.measured))
        return output

    def _middle(self) -> tuple[int, int]:
        settings = self.contexts.spec.settings
        return settings.Fn_compute_blocks, self.size - settings.Bn_compute_blocks

    def _pass_of(self, index: int, given: Any) -> _Pass | None:
        """The pass that enters gate ``index`` with ``given``; None, now and until the forward ends, if none is sure.

        A pass enters each gate once, in rising order. Among several that may come here, it is the one whose last
        gate returned what this one is given.
        """
        if self.mixed:
            return None
        ahead = [each for each in self._passes if each.position < index]
        if len(ahead) > 1:
            ahead = [each for each in ahead if each.returned(given)]
            self.mixed = len(ahead) != 1
            return None if self.mixed else ahead[0]
        if ahead:
            return ahead[0]
        number = len(self._passes)
        self._passes.append(_Pass(key=self.name if number == 0 else f"{self.name}#{number}"))
        return self._passes[-1]

    def _decide(self, gate: Gate, current: _Pass, streams: Streams, args: Any, kwargs: Any) -> tuple[Any, Any]:
        entry = {name: self._settled(value) for name, value in streams.items()}
        hidden = entry[self.measured]
        # Where the loop ran none of the first blocks there is no residual; the states themselves are compared.
        residual = first_residual(self._first, current.start, hidden) if current.position >= 0 else hidden
        contexts = self.contexts
        contexts.set_context(current.key)
        contexts.mark_step_begin()
        current.cached = contexts.can_cache(residual, prefix=f"{self.name}_Fn_residual")
        if current.cached:
            contexts.add_cached_step()
        else:
            contexts.set_Fn_buffer(residual, prefix=f"{self.name}_Fn_residual")
        current.entry = entry if current.cached else {name: self._kept(value) for name, value in entry.items()}
        current.start, current.open = None, True
        return gate.write(entry, args, kwargs) if self._settle is not None else (args, kwargs)

    def _close(self, current: _Pass, streams: Streams) -> Streams:
        """End the middle: note its residuals, or forecast its outcome."""
        current.open = False
        context = self.contexts.set_context(current.key)
        if current.cached:
            return {name: self._forecast(context, name, current.entry[name]) for name in self.streams}
        streams = {name: self._settled(value) for name, value in streams.items()}
        for name, value in streams.items():
            self._note(context, name, current.entry[name], value)
        current.entry = None
        return streams

    def _note(self, context: Any, name: str, entry: Any, value: Any) -> None:
        context.absent.discard(name)
        if value is None:
            context.absent.add(name)
            return
        residual = value if entry is None else value - entry
        if name == self.measured:
            self.contexts.set_Bn_buffer(residual, prefix=f"{self.name}_Bn_residual")
        else:
            self.contexts.set_Bn_encoder_buffer(residual, prefix=f"{self.name}_{name}_Bn_residual")

    def _forecast(self, context: Any, name: str, entry: Any) -> Any:
        if name in context.absent:
            return None
        if name == self.measured:
            residual = self.contexts.get_Bn_buffer(f"{self.name}_Bn_residual")
        else:
            residual = self.contexts.get_Bn_encoder_buffer(f"{self.name}_{name}_Bn_residual")
        return residual if entry is None else entry + residual

    def _settled(self, value: Any) -> Any:
        if value is None or isinstance(value, torch.Tensor):
            return value
        if self._settle is None:
            raise MountError(f"{self.name}: a block's states are {type(value).__name__}, expected a tensor")
        return self._settle(value)

    def _kept(self, value: Any) -> Any:
        return value.clone() if self._copies and isinstance(value, torch.Tensor) else value

    def _is_bare(self, output: Any) -> bool:
        """Whether a block returned its only stream as it is, be it unfinished."""
        return isinstance(output, torch.Tensor) or (self._settle is not None and len(self.streams) == 1)

    def _unpacked(self, output: Any) -> Streams:
        values = (output,) if self._is_bare(output) else output
        return dict(zip(self.streams, values, strict=False))

    def _hand_on(self, current: _Pass, streams: Streams, like: Any = None) -> Any:
        """What a block returns for ``streams``; further values are those of ``like``, or None."""
        current.handed(streams[self.measured])
        values = [streams[name] for name in self.streams]
        if current.outputs is None and len(values) == 1:
            return values[0]
        rest = [None] * ((current.outputs or 0) - len(values)) if like is None else like[len(values) :]
        return (*values, *rest)


class Gate(nn.Module):
    """In place of one block: runs it or leaves it out.

    Everything else that the loop asks of the block is the block's.
    """

    def __init__(self, chain: Chain, block: nn.Module, index: int):
        super().__init__()
        # Not registered: the block stays a submodule of its transformer alone.
        self.__dict__["block"] = block
        self.chain, self.index = chain, index
        self._places = _places(block, chain.streams)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    # The block under it is compiled where the host compiles; the decision is not.
    @no_compile
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's own; values are the block's, or the inputs handed on."""
        current, runs, args, kwargs = self.chain.before(self, args, kwargs)
        if not runs:
            return args
        return self.chain.after(self, current, self.block(*args, **kwargs))

    def read(self, name: str, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """The value of stream ``name`` in a call of the block."""
        if name in kwargs:
            return kwargs[name]
        place = self._places.get(name)
        return args[place] if place is not None and place < len(args) else None

    def write(self, streams: Streams, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """The call with other values for the streams."""
        args, kwargs = list(args), dict(kwargs)
        for name, value in streams.items():
            place = self._places.get(name)
            if name in kwargs or place is None or place >= len(args):
                kwargs[name] = value
            else:
                args[place] = value
        return tuple(args), kwargs


def fits(block: nn.Module, streams: tuple[str, ...]) -> bool:
    """Whether a block takes all of ``streams``."""
    parameters = inspect.signature(block.forward).parameters.values()
    names = {parameter.name for parameter in parameters}
    return names >= set(streams) or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)


def _places(block: nn.Module, streams: tuple[str, ...]) -> dict[str, int]:
    """Position of each stream among the block's arguments; those that only keywords reach are left out."""
    if not fits(block, streams):
        raise MountError(f"{type(block).__name__} does not take {', '.join(streams)}")
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [each.name for each in inspect.signature(block.forward).parameters.values() if each.kind in kinds]
    return {name: names.index(name) for name in streams if name in names}
