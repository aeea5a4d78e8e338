"""Keeping torch.compile out of the cache, but not out of the model under it."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """Keep torch.compile out of ``function`` and of all that it calls."""
    return cast(F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def no_compile(function: F) -> F:
    """Keep torch.compile out of ``function``, but not out of what it calls.

    So the original forward under it compiles to the graphs that it had before.
    """
    return cast(F, torch.compiler.disable(function, recursive=False))  # type: ignore[no-untyped-call]


def with_own_code(function: Any) -> Any:
    """The same function with a code object of its own.

    torch.compile keeps graphs, and its decision to give up on a frame, for each code object. The cached
    forward breaks into several graphs; the original must not pay for that.
    """
    if isinstance(function, types.MethodType):
        return types.MethodType(with_own_code(function.__func__), function.__self__)
    if not isinstance(function, types.FunctionType):
        return function
    inner = getattr(function, "__wrapped__", None)
    cells = tuple(
        types.CellType(with_own_code(inner)) if inner is not None and _content(cell) is inner else cell
        for cell in function.__closure__ or ()
    )
    copy = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, cells or None
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    return copy


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None
