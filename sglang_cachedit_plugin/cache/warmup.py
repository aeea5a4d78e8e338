"""What a warmup request does beside its own steps, so that the first real request meets nothing new.

The host warms up with one or two steps, and the first steps of a request are always computed. So the first forward
of each branch is run a few times more, in every way in which a request runs it: uncached, computed, measured and
cached, with the forecasts asked for. What came of it is dropped, and the request starts over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..config.settings import CacheSettings
from ..errors import CacheDitError
from ..report.stats import RequestStats
from .compiling import no_compile, untraced
from .spec import Identity, RequestSpec, TransformerSpec
from .step_plan import StepPlan


class Warmup:
    """Every way to run a forward, once for each transformer and branch of a warmup request.

    Args:
        warn: told why it broke off; the request goes on.
        compiled: uncached forwards too; where the host compiles, they may be graphs of their own.
    """

    def __init__(self, warn: Callable[[str], None], *, compiled: bool):
        self._warn, self._compiled = warn, compiled
        self._done: set[tuple[str, str]] = set()

    @no_compile
    def run(self, mounted: Any, identity: Identity, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward of a ``CachedTransformer``.

        Raises:
            CacheDitError: the mount is wrong and the request is strict, or ranks disagree.
            torch.OutOfMemoryError: the host tries a smaller request then.
        """
        request = mounted.request
        # Ranks that gather weights from one another warm up at the same time, whatever their branches.
        key = (mounted.name, "" if request.groups.gathered else identity.branch)
        if key in self._done:
            return
        self._done.add(key)
        try:
            if self._compiled:
                mounted.run_original(args, kwargs)
            for each in _ways(request, request.of(mounted.name), blocks=bool(mounted.num_blocks)):
                mounted.begin(each)
                last = each.transformers[0].plan.num_steps - 1
                mounted.run(Identity(identity.branch, 0), args, kwargs)
                mounted.cache.repeat_values(range(1, last))
                mounted.run(Identity(identity.branch, last), args, kwargs)
        except (CacheDitError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            self._warn(f"warmup of cached steps broke off: {type(error).__name__}: {error}")
        finally:
            mounted.begin(request)


@untraced
def _ways(request: RequestSpec, spec: TransformerSpec, *, blocks: bool) -> list[RequestSpec]:
    """A computed step and a cached one for each forecast that requests with these settings use.

    The same blocks and forecasts, and a threshold under which equal inputs are cached. Nothing is decided with the
    other CFG ranks, which may have no such branch, unless they share weights.
    """
    settings: CacheSettings = replace(
        spec.settings, residual_diff_threshold=0.99, max_accumulated_residual_diff_threshold=None,
        lockstep=False, verify_ranks=False, cfg_diff_compute_separate=True, schedules=None,
        steps_computation_mask=None, scm_compute_bins=None, scm_cache_bins=None,
    )
    plans = []
    if blocks:
        last = max(2, settings.dmd_history if settings.calibrator == "dmd" else settings.taylorseer_order + 1)
        plans.append(("residual", StepPlan(num_steps=last + 1, warmup=frozenset({0}))))
    if settings.forecast == "output":
        plans.append(("output", StepPlan(num_steps=2, mask=(1, 0), static=True)))
    return [
        replace(
            request, stats=RequestStats(backend="", enabled=True), on_forward=None, warmup=None,
            transformers=(TransformerSpec(name=spec.name, settings=replace(settings, forecast=forecast), plan=plan),),
        )
        for forecast, plan in plans
    ]
