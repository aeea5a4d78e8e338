"""One host in one process for all cases."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sglang_cachedit_plugin import hooks
from tests.models.native.harness import started


@pytest.fixture(scope="package", autouse=True)
def host() -> Iterator[None]:
    with started():
        yield


@pytest.fixture
def hooked(monkeypatch) -> None:
    """The plugin's hooks on stages and executors, as the host's registry puts them there."""
    for point in hooks.HOOK_POINTS:
        if ".pipelines_core." not in point.target:
            continue
        module, cls, method = point.target.rsplit(".", 2)
        owner = getattr(importlib.import_module(module), cls)
        monkeypatch.setattr(owner, method, _hooked(getattr(owner, method), point))


def _hooked(original: Callable[..., Any], point: hooks.HookPoint) -> Callable[..., Any]:
    hook = point.hook()
    given = {"around": (original,), "replace": ()}[point.kind]

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return hook(*given, *args, **kwargs)

    return method
