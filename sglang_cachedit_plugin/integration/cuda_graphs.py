"""Caching around the host's breakable CUDA graphs.

A graph of the host replays a whole forward of the transformer; nothing in Python runs inside it, so no decision can
fall between blocks. A static schedule with ``forecast: output`` needs none: a computed step replays the host's own
graph, and on a cached step nothing of the transformer runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..cache.cached_transformer import CachedTransformer
from ..config.effective import Decision
from ..config.settings import CacheSettings
from ..errors import Reason
from .request import WORKER

REFUSED = Reason(
    "cuda_graphs", "breakable CUDA graphs are on: they replay the transformer as a whole, so only an error tolerance, "
    "or forecast: output with a static schedule, is cached"
)
CAPTURING = Reason(
    "cuda_graphs", "breakable CUDA graphs are captured by this warmup request, every step is computed"
)


def fits(decision: Decision) -> bool:
    """Whether a request can be cached around a graph."""
    return _fits(decision.resolved.primary) and _fits(decision.resolved.secondary)


def _fits(settings: CacheSettings) -> bool:
    if settings.error_tolerance is not None:
        return True
    scheduled = settings.steps_computation_mask or settings.scm_compute_bins or settings.schedules
    return bool(scheduled) and settings.steps_computation_policy == "static" and settings.forecast == "output"


def refusal(decision: Decision, batch: Any) -> str | None:
    """Why a request cannot be cached around a graph, None where it can."""
    if batch.is_warmup:
        return CAPTURING
    return None if fits(decision) else REFUSED


class Around:
    """In place of the host's runner of one transformer: cached steps never reach it. All else is the runner's."""

    def __init__(self, runner: Any, mounted: CachedTransformer):
        self._runner, self._mounted = runner, mounted

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_runner"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One forward: a graph's replay or, where the runner has none, the transformer itself."""
        return self._mounted.run_around(self._runner, args, kwargs)


def runner_of(original: Callable[..., Any], stage: Any, current_model: Any) -> Any:
    """Around ``DenoisingStage._maybe_get_bcg_runner``."""
    runner, model = original(stage, current_model), WORKER.models.get(stage)
    if runner is None or model is None:
        return runner
    mounted = next((each for each in model.mounted.values() if each.module is current_model), None)
    around = mounted is not None and mounted.request is not None and mounted.request.around
    return Around(runner, mounted) if around else runner
