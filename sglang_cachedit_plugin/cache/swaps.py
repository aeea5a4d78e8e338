"""What stands in for a transformer's block lists while it caches."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from cache_dit import BlockAdapter, BlockAdapterRegister, ForwardPattern
from cache_dit.caching.cache_blocks import UnifiedBlocks
from torch import nn

from .. import adapters
from ..adapters import entry_points
from ..errors import MountError
from .block_hooks import Chain, fits
from .compiling import untraced
from .contexts import BranchContexts
from .mount_check import ChainProbe, watch_list
from .sequence_parallel import measure_parts


@dataclass(frozen=True)
class Swap:
    """One attribute that holds a block list, and what replaces it."""

    parent: nn.Module
    name: str
    cached: nn.Module


@dataclass
class Swaps:
    """Everything that is replaced in one transformer."""

    lists: list[Swap] = field(default_factory=list)
    chains: list[Chain] = field(default_factory=list)
    num_blocks: list[int] = field(default_factory=list)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The replacements stand in the transformer inside."""
        own = [each.parent._modules[each.name] for each in self.lists]
        for chain in self.chains:
            chain.reset()
        for each in self.lists:
            each.parent._modules[each.name] = each.cached
        try:
            yield
        finally:
            for each, module in zip(self.lists, own, strict=True):
                each.parent._modules[each.name] = module
            for chain in self.chains:
                chain.reset()


    @contextmanager
    def watched(self, first: int, last: int) -> Iterator[list[ChainProbe]]:
        """Probes of all chains, for a forward inside with these first and last blocks."""
        probes = [chain.watch(first, last) for chain in self.chains]
        with ExitStack() as stack:
            for swap in self.lists if not self.chains else ():
                for stand_in in swap.cached:
                    probes.append(_probe_of(swap.name, stand_in, first, last))
                    stack.enter_context(watch_list(stand_in, probes[-1]))
            try:
                yield probes
            finally:
                for chain in self.chains:
                    chain.probe = None


def _probe_of(name: str, stand_in: Any, first: int, last: int) -> ChainProbe:
    size, pattern = len(stand_in.transformer_blocks), stand_in.forward_pattern
    streams = ("hidden_states",) if pattern.Return_H_Only else tuple(pattern.Out)
    return ChainProbe(name, size, (first, size - last), streams, "hidden_states")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep cache-dit's mount chatter (wrong about contexts and CFG here) out of the log."""
    previous = logging.root.manager.disable
    logging.disable(max(previous, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(previous)


def build(transformer: nn.Module, contexts: BranchContexts, pipe: Any = None) -> Swaps:
    """The replacements for a transformer's block lists.

    Raises:
        MountError: nobody describes the class, or its blocks are not as described.
    """
    row = adapters.find_adapter(type(transformer))
    if row is not None and any(each.streams for each in row.blocks):
        return _gated(transformer, row, contexts)
    adapter = find_blocks(transformer, pipe)
    index = [id(module) for module in adapter.transformer].index(id(transformer))
    return _listed(transformer, adapter, index, contexts)


def _gated(transformer: nn.Module, row: adapters.ModelAdapter, contexts: BranchContexts) -> Swaps:
    swaps = Swaps()
    for each in _present(transformer, row):
        parent, blocks = _list(transformer, each.name)
        if not (each.shares_decision and swaps.chains):
            materialize = _function(transformer, each.materialize) if each.materialize else None
            swaps.chains.append(
                Chain(
                    each.name, contexts, each.streams, each.measured or each.streams[0],
                    copies=each.in_place, materialize=materialize,
                )
            )
            swaps.num_blocks.append(0)
        chain = swaps.chains[-1]
        gates = nn.ModuleList(chain.gate(block) for block in blocks)
        swaps.lists.append(Swap(parent, each.name.rpartition(".")[2], gates))
        swaps.num_blocks[-1] = chain.size
    return swaps


def _present(transformer: nn.Module, row: adapters.ModelAdapter) -> list[adapters.Blocks]:
    """The described lists that this transformer has; of several descriptions of one list the first that fits.

    Raises:
        MountError: a list is missing, or fits none of its descriptions.
    """
    found: dict[str, adapters.Blocks] = {}
    for each in row.blocks:
        _, blocks = _list(transformer, each.name)
        if each.name not in found and (len(blocks) == 0 or all(fits(block, each.streams) for block in blocks)):
            found[each.name] = each
    if missing := {each.name for each in row.blocks} - set(found):
        raise MountError(
            f"{type(transformer).__name__}: its blocks are not as declared: {', '.join(sorted(missing))}"
        )
    return [each for each in found.values() if len(_list(transformer, each.name)[1])]


def _function(transformer: nn.Module, name: str) -> Any:
    """Function ``name`` of the module in which the transformer's class or a base of it is defined."""
    homes = [sys.modules[cls.__module__] for cls in type(transformer).__mro__]
    found = next((getattr(home, name) for home in homes if hasattr(home, name)), None)
    if found is None:
        raise MountError(f"{type(transformer).__name__}: its module has no {name}")
    return found


def _list(transformer: nn.Module, path: str) -> tuple[nn.Module, nn.ModuleList]:
    parent, _, name = path.rpartition(".")
    try:
        owner = transformer.get_submodule(parent)
        return owner, owner._modules[name]
    except (AttributeError, KeyError) as error:
        raise MountError(
            f"{type(transformer).__name__}: its blocks are not as declared: it has no {path}"
        ) from error


def find_blocks(transformer: nn.Module, pipe: Any = None) -> BlockAdapter:
    """cache-dit's normalised description of a transformer's blocks.

    Raises:
        MountError: nobody describes the class, or it cannot be cached.
    """
    name = type(transformer).__name__
    row = adapters.find_adapter(type(transformer))
    if row is not None and not row.blocks:
        raise MountError(f"{name}: {row.no_blocks or row.refused}")
    try:
        with _quiet():
            if row is not None:
                adapter = _from_row(transformer, row)
            elif pipe is not None and BlockAdapterRegister.is_supported(pipe):
                adapter = BlockAdapterRegister.get_adapter(pipe)
            else:
                adapter = BlockAdapterRegister.get_adapter(transformer)
            if adapter is None:
                raise MountError("; ".join([f"{name}: no adapter describes its blocks", *entry_points.load().problems]))
            return BlockAdapter.normalize(adapter)
    except MountError:
        raise
    except Exception as error:
        # cache-dit's register runs third-party attribute look-ups; whatever they raise is the reason.
        raise MountError(f"{name}: its blocks are not as declared: {error}") from error


def _from_row(transformer: nn.Module, row: adapters.ModelAdapter) -> BlockAdapter:
    return BlockAdapter(
        transformer=transformer,
        blocks=[getattr(transformer, each.name) for each in row.blocks],
        blocks_name=[each.name for each in row.blocks],
        forward_pattern=[getattr(ForwardPattern, f"Pattern_{each.pattern}") for each in row.blocks],
        check_forward_pattern=False,
    )


def _listed(transformer: nn.Module, adapter: BlockAdapter, index: int, contexts: BranchContexts) -> Swaps:
    swaps = Swaps(num_blocks=[len(blocks) for blocks in adapter.blocks[index]])
    with _quiet():
        for name, unique, blocks, pattern in zip(
            adapter.blocks_name[index], adapter.unique_blocks_name[index], adapter.blocks[index],
            adapter.forward_pattern[index], strict=True,
        ):
            try:
                cached = UnifiedBlocks(
                    blocks,
                    transformer=transformer,
                    forward_pattern=pattern,
                    check_forward_pattern=adapter.check_forward_pattern,
                    check_num_outputs=adapter.check_num_outputs,
                    cache_prefix=name,
                    cache_context=unique,
                    context_manager=contexts,
                )
            except AssertionError as error:
                raise MountError(f"{type(transformer).__name__}.{name}: {error}") from error
            measure_parts(cached, blocks[0])
            swaps.lists.append(Swap(transformer, name, nn.ModuleList([untraced(cached)])))
    for name in adapter.dummy_blocks_names[index] if adapter.dummy_blocks_names else ():
        swaps.lists.append(Swap(transformer, name, nn.ModuleList()))
    return swaps
