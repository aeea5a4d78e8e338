"""The block lists of a transformer that can be cached, and the hooks that stand in for their blocks."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import nn

from .. import adapters
from ..adapters import Blocks, entry_points
from ..config.settings import CacheSettings
from ..errors import MountError, Reason
from .block_hooks import SharedBlockState, fits, positional
from .branch_cache import BranchCache
from .mount_check import BlockProbe


@dataclass(frozen=True)
class BlockListPatch:
    """One attribute that holds a block list, and the hooks that replace it."""

    parent: nn.Module
    name: str
    hooks: nn.ModuleList


@dataclass
class BlockLists:
    """Everything that is replaced in one transformer."""

    patches: list[BlockListPatch] = field(default_factory=list)
    shared: list[SharedBlockState] = field(default_factory=list)

    @property
    def num_blocks(self) -> list[int]:
        """Number of blocks over which each decision holds."""
        return [each.size for each in self.shared]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The hooks stand in the transformer inside."""
        own = [each.parent._modules[each.name] for each in self.patches]
        for shared in self.shared:
            shared.reset()
        for each in self.patches:
            each.parent._modules[each.name] = each.hooks
        try:
            yield
        finally:
            for each, module in zip(self.patches, own, strict=True):
                each.parent._modules[each.name] = module
            for shared in self.shared:
                shared.reset()

    @contextmanager
    def watched(self, first: int, last: int) -> Iterator[list[BlockProbe]]:
        """Probes for a forward inside with these numbers of first and last blocks."""
        try:
            yield [shared.watch(first, last) for shared in self.shared]
        finally:
            for shared in self.shared:
                shared.probe = None


def build(transformer: nn.Module, cache: BranchCache, pipe: Any = None) -> BlockLists:
    """The hooks for a transformer's block lists.

    Raises:
        MountError: nobody describes the class, or its blocks are not as described.
    """
    built = BlockLists()
    for each in describe(transformer, pipe):
        parent, blocks = _list(transformer, each.name)
        if not (each.shares_decision and built.shared):
            materialize = _function(transformer, each.materialize) if each.materialize else None
            built.shared.append(SharedBlockState(each, cache, materialize=materialize))
        shared = built.shared[-1]
        hooks = nn.ModuleList(shared.hook(block) for block in blocks)
        built.patches.append(BlockListPatch(parent, each.name.rpartition(".")[2], hooks))
    return built


def describe(transformer: nn.Module, pipe: Any = None) -> list[Blocks]:
    """The block lists that this transformer has; of several descriptions of one list the first that fits.

    Args:
        pipe: the diffusers pipeline, by whose class cache-dit's register may know the transformer.

    Raises:
        MountError: nobody describes the class, it cannot be cached, or a list is missing or fits no description.
    """
    name, row = type(transformer).__name__, adapters.find_adapter(type(transformer))
    if row is not None and not row.blocks:
        raise MountError(Reason("model", f"{name}: {row.output_only or row.unsupported}"))
    described = row.blocks if row is not None else _from_register(transformer, pipe)
    if not described:
        why = "; ".join([f"{name}: no adapter describes its blocks", *entry_points.load().problems])
        raise MountError(Reason("no_adapter", why))
    found: dict[str, Blocks] = {}
    for each in described:
        if each.name not in found and all(fits(block, each) for block in _list(transformer, each.name)[1]):
            found[each.name] = each
    if missing := {each.name for each in described} - set(found):
        raise MountError(f"{name}: its blocks are not as declared: {', '.join(sorted(missing))}")
    return [each for each in found.values() if len(_list(transformer, each.name)[1])]


def why_not_cached(
    cls: type, settings: CacheSettings, sizes: Collection[int] = (), *, name: str = "the model"
) -> Reason | None:
    """Why a class is not cached with these settings, None where nothing speaks against it.

    The engine asks before each request, a worker at its start, and the doctor.

    Args:
        sizes: numbers of blocks over which each decision holds; empty where they are not known.
        name: of the transformer.
    """
    row = adapters.find_adapter(cls)
    if row is not None and row.unsupported:
        return Reason("model", f"{cls.__name__}: {row.unsupported}")
    if settings.error_tolerance is not None:
        return None
    if row is not None and row.output_only:
        why = f"{cls.__name__}: {row.output_only}; error_tolerance or forecast: output can be used"
        return None if settings.forecast == "output" else Reason("model", why)
    first, last = settings.Fn_compute_blocks, settings.Bn_compute_blocks
    if sizes and first + last > min(sizes):
        why = f"Fn_compute_blocks {first} + Bn_compute_blocks {last} exceed the {min(sizes)} blocks of {name}"
        return Reason("block_count", why)
    if last > first and row is not None and any(each.mirrored for each in row.blocks):
        return Reason(
            "block_count", f"{cls.__name__}: its last blocks take what its first ones made: Bn_compute_blocks {last} "
            f"must not exceed Fn_compute_blocks {first}"
        )
    return None


def _list(transformer: nn.Module, path: str) -> tuple[nn.Module, nn.ModuleList]:
    parent, _, name = path.rpartition(".")
    try:
        owner = transformer.get_submodule(parent)
        return owner, cast(nn.ModuleList, owner._modules[name])
    except (AttributeError, KeyError) as error:
        raise MountError(
            f"{type(transformer).__name__}: its blocks are not as declared: it has no {path}"
        ) from error


def _function(transformer: nn.Module, name: str) -> Any:
    """Function ``name`` of the module in which the transformer's class or a base of it is defined."""
    homes = [sys.modules[cls.__module__] for cls in type(transformer).__mro__]
    found = next((getattr(home, name) for home in homes if hasattr(home, name)), None)
    if found is None:
        raise MountError(f"{type(transformer).__name__}: its module has no {name}")
    return found


def _from_register(transformer: nn.Module, pipe: Any) -> list[Blocks]:
    """What cache-dit's register says of a class, in our terms; empty where it does not know it.

    The adapter is read and not applied: its functor and dummy lists make a model fit a loop of cache-dit's own.
    """
    from cache_dit import BlockAdapter, BlockAdapterRegister

    name = type(transformer).__name__
    try:
        known = pipe is not None and BlockAdapterRegister.is_supported(pipe)
        adapter = BlockAdapterRegister.get_adapter(pipe if known else transformer, skip_post_init=True)
        if adapter is None:
            return []
        adapter = BlockAdapter.normalize(adapter, unique=False)
        at = [id(each) for each in adapter.transformer].index(id(transformer))
        lists = zip(adapter.blocks[at], adapter.forward_pattern[at], strict=True)
        return [each for blocks, pattern in lists for each in _translated(transformer, blocks, pattern)]
    except Exception as error:
        # Factories of third parties look up attributes; whatever they raise is the reason.
        raise MountError(f"{name}: its blocks are not as declared: {error}") from error


def _translated(transformer: nn.Module, blocks: Sequence[nn.Module], pattern: Any) -> list[Blocks]:
    """One list of an adapter; where it joins several lists of the transformer, one decision holds for them.

    Args:
        pattern: a ``ForwardPattern``: ``In`` and ``Out`` name what a block takes and returns, by position.
    """
    members = set(map(id, blocks))
    paths = [
        path for path, each in transformer.named_modules()
        if isinstance(each, nn.ModuleList) and len(each) and members.issuperset(map(id, each))
    ]
    if not paths:
        raise MountError("its blocks are in no list of the transformer")
    names = positional(blocks[0])
    known = {} if set(pattern.In) <= set(names) else dict(zip(pattern.In, names, strict=False))
    own = {each: known.get(each, each) for each in pattern.Out}
    returned = tuple(each for each in pattern.Out if each not in pattern.In and each not in names)
    first = Blocks(name=paths[0], streams=tuple(own.values()), measured=own["hidden_states"], returned=returned)
    return [first, *(replace(first, name=path, shares_decision=True) for path in paths[1:])]
