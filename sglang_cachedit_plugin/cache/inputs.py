"""The form of what a forward is given: what was computed from inputs of another form is not reused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from .compiling import untraced

Given = Mapping[str, tuple[Any, ...]]
"""By place among the arguments of a forward: shape and dtype of a tensor, length of a list of tensors."""


@untraced
def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given:
    """The form of a forward's arguments, looked for in lists, mappings and the fields of dataclasses.

    The ranks that share a forward see a change at once: the host cuts a sequence into equal shards, and a model that
    cuts it otherwise does so within its forward.
    """
    return dict(_forms("", (*args, kwargs)))


@untraced
def differ(before: Given, now: Given) -> bool:
    """Whether an argument has another form now.

    One that comes new is no difference: the first forward of a request may fill what the later ones are given, such
    as the keys of its prompt.
    """
    return before != now and any(before[place] != now[place] for place in before.keys() & now.keys())


def _forms(place: str, value: Any, *, inside: bool = False) -> Iterator[tuple[str, tuple[Any, ...]]]:
    if isinstance(value, torch.Tensor):
        yield place, (value.shape, value.dtype)
        return
    parts: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, list | tuple):
        parts = list(enumerate(value))
        if any(isinstance(each, torch.Tensor) for each in value):
            yield place, (len(value),)
    elif is_dataclass(value) and not isinstance(value, type) and not inside:
        # Not those within: a request of the host is one too, and all that hangs on it.
        parts, inside = [(each.name, getattr(value, each.name)) for each in fields(value)], True
    for name, part in parts:
        yield from _forms(f"{place}.{name}", part, inside=inside)
