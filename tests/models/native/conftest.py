"""One host in one process for all cases."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sglang_cachedit_plugin import hooks

from .harness import started


@pytest.fixture(scope="package", autouse=True)
def host() -> Iterator[None]:
    with started():
        yield


@pytest.fixture
def hooked(monkeypatch) -> None:
    """The plugin's hooks on stages and executors, as the host's registry puts them there."""
    for seam in hooks.SEAMS:
        if ".pipelines_core." not in seam.target:
            continue
        module, cls, method = seam.target.rsplit(".", 2)
        owner = getattr(importlib.import_module(module), cls)
        monkeypatch.setattr(owner, method, _hooked(getattr(owner, method), seam))


def _hooked(original: Callable[..., Any], seam: hooks.Seam) -> Callable[..., Any]:
    hook = seam.hook()
    given = {"around": (original,), "replace": ()}[seam.kind]

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return hook(*given, *args, **kwargs)

    return method
