"""All transformers of one model, as the runtime drives them.

cache-dit's ``enable_cache`` is not used: it keeps its state on classes, cannot be undone in 1.5.1, and binds contexts
before branches are known. Its parts are: the register of block lists, the cached blocks, the contexts and the
calibrators.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import cache_dit
from torch import nn

from ..report.stats import RequestStats, TransformerStats
from . import kernels
from .cached_transformer import CachedTransformer, Identify, OnForward
from .runtime import Groups, RequestSpec
from .warmup import Rehearsal

__all__ = ["CachedTransformer", "Identify", "ModelBackend", "OnForward", "describe_models", "preset_mask"]


def preset_mask(preset: str, num_steps: int) -> list[int]:
    """cache-dit's mask for a preset; 1 computed, 0 may be cached."""
    return cache_dit.steps_mask(mask_policy=preset, total_steps=num_steps)


class ModelBackend:
    """All transformers of one model, as the runtime drives them.

    Args:
        modules: transformers by name.
        identify: the host's word on which forward is under way.
        pipe: the diffusers pipeline, if there is one.

    ``groups`` are set before each request: the host may lay the same ranks out differently from one to the next.
    """

    def __init__(self, modules: Mapping[str, nn.Module], identify: Identify, *, pipe: Any = None):
        self.modules = dict(modules)
        self.identify = identify
        self._pipe = pipe
        self.groups = Groups()
        self.mounted: dict[str, CachedTransformer] = {}
        self.stats: RequestStats | None = None
        _models.add(self)

    def mount(self) -> None:
        """Prepare every transformer, or none."""
        try:
            for name, module in self.modules.items():
                self.mounted[name] = CachedTransformer(name, module, self._pipe)
                weights = next(module.parameters(), None)
                if weights is not None and weights.is_floating_point():
                    kernels.prepare(weights.device, weights.dtype)
        except BaseException:
            for transformer in self.mounted.values():
                transformer.unmount()
            self.mounted.clear()
            raise

    def identify_outside(self) -> None:
        """Hooks now stand around the transformers; see ``CachedTransformer.identify_outside``."""
        for transformer in self.mounted.values():
            transformer.identify_outside()

    def refresh(self, spec: RequestSpec) -> None:
        """Start a request on the transformers that ``spec`` names; the others run as they are."""
        assert self.stats is not None
        self.bypass()
        for each in spec.transformers:
            stats = self.stats.transformers.setdefault(each.name, TransformerStats(steps=0))
            stats.steps = each.plan.num_steps
            self.mounted[each.name].refresh(each, stats, self.identify, self.groups)

    def problem(self) -> str | None:
        """What the forwards so far have shown to be wrong with a mount, None for nothing. Waits for the device."""
        return next((found for each in self.mounted.values() if (found := each.problem()) is not None), None)

    def bypass(self) -> None:
        """Run the original forwards."""
        for transformer in self.mounted.values():
            transformer.bypass()

    def rehearse(self, rehearsal: Rehearsal) -> None:
        """Before the request's own forwards, run what later requests will run."""
        for transformer in self.mounted.values():
            if transformer.contexts.spec is not None:
                transformer.rehearsal = rehearsal

    def watch(self, on_forward: OnForward) -> None:
        """Tell ``on_forward`` of each computed forward until the request ends."""
        for transformer in self.mounted.values():
            transformer.on_forward = on_forward

    def buffer_bytes(self) -> int:
        """Bytes of all tensors held for cached steps."""
        return sum(transformer.buffer_bytes() for transformer in self.mounted.values())

    def describe(self) -> dict[str, Any]:
        """What is mounted: transformers with class and cached block lists, and bytes held between requests."""
        return {
            "backend": "native" if self._pipe is None else "diffusers",
            "transformers": {name: each.describe() for name, each in self.mounted.items()},
            "buffer_bytes": self.buffer_bytes(),
        }


_models: weakref.WeakSet[ModelBackend] = weakref.WeakSet()


def describe_models() -> list[dict[str, Any]]:
    """Every model of this process whose transformers are mounted."""
    return [model.describe() for model in list(_models) if model.mounted]
