"""Caching around the host's breakable CUDA graphs.

A graph of the host replays a whole forward of the transformer; nothing in Python runs inside it, so no decision can
fall between blocks. A static schedule with ``forecast: output`` needs none: a computed step replays the host's own
graph, and on a cached step nothing of the transformer runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..cache.cached_transformer import CachedTransformer, Identify
from ..config.settings import CacheSettings

REFUSED = (
    "breakable CUDA graphs are on: they replay the transformer as a whole, so only an error tolerance, or "
    "forecast: output with a static schedule, is cached"
)
CAPTURING = "breakable CUDA graphs are captured by this warmup request, every step is computed"

_around: weakref.WeakKeyDictionary[nn.Module, tuple[CachedTransformer, Identify]] = weakref.WeakKeyDictionary()


def fits(settings: CacheSettings) -> bool:
    """Whether requests with these settings can be cached around a graph."""
    if settings.error_tolerance is not None:
        return True
    scheduled = settings.steps_computation_mask or settings.scm_compute_bins or settings.schedules
    return bool(scheduled) and settings.steps_computation_policy == "static" and settings.forecast == "output"


def serve(transformers: Iterable[CachedTransformer], identify: Identify) -> None:
    """Cache around the graphs of ``transformers`` from now on; what runs inside them runs as it is."""
    for each in transformers:
        _around[each.module] = (each, identify)


def stop(modules: Iterable[nn.Module]) -> None:
    """Nothing is cached around the graphs of these transformers."""
    for module in modules:
        _around.pop(module, None)


def nobody(name: str, kwargs: Any) -> None:
    """Identity of the forwards inside a graph: none, they run as they are."""
    return None


class _Around:
    """In place of the host's runner of one transformer: cached steps never reach it. All else is the runner's."""

    def __init__(self, runner: Any, mounted: CachedTransformer, identify: Identify):
        self._runner, self._mounted, self._identify = runner, mounted, identify

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_runner"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One forward: a graph's replay or, where the runner has none, the transformer itself."""
        identity = self._identify(self._mounted.name, kwargs)
        if identity is None:
            return self._runner(*args, **kwargs)
        return self._mounted.run_around(self._runner, identity, args, kwargs)


def runner_of(original: Callable[..., Any], stage: Any, current_model: Any) -> Any:
    """Around ``DenoisingStage._maybe_get_bcg_runner``."""
    runner = original(stage, current_model)
    if runner is None or current_model not in _around:
        return runner
    return _Around(runner, *_around[current_model])
