"""Forwards that stand in modules for a while, and the modules' own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from .sequence_parallel import hooked_forward

_ABSENT = object()


def set_forwards(forwards: Mapping[nn.Module, Any]) -> dict[nn.Module, Any]:
    """Set the modules' own ``forward`` attributes; returns what they were.

    Where hooks split a module over ranks, the forward beneath them is set.
    """
    previous = {}
    for module, forward in forwards.items():
        hooked = hooked_forward(module)
        own = module.__dict__ if hooked is None else vars(hooked)
        previous[module] = own.get("forward", _ABSENT)
        if forward is _ABSENT:
            own.pop("forward", None)
        else:
            own["forward"] = forward
    return previous


@contextmanager
def undone(transformer: nn.Module, pipe: Any) -> Iterator[dict[nn.Module, Any]]:
    """Undo every forward that is replaced inside; afterwards the mapping holds the replacements."""
    roots = [transformer, *(getattr(pipe, name, None) for name in ("transformer", "transformer_2"))]
    roots = [root for root in roots if isinstance(root, nn.Module)]
    flags = [root.__dict__.get("_is_patched", _ABSENT) for root in roots]
    before = {m: m.__dict__.get("forward", _ABSENT) for root in roots for m in root.modules()}
    replacements: dict[nn.Module, Any] = {}
    try:
        yield replacements
    finally:
        after = {m: m.__dict__.get("forward", _ABSENT) for m in before}
        changed = {m: own for m, own in before.items() if after[m] is not own}
        replacements.update({m: after[m] for m in changed})
        set_forwards(changed)
        for root, flag in zip(roots, flags, strict=True):
            if flag is _ABSENT:
                root.__dict__.pop("_is_patched", None)
