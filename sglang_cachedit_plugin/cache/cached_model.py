"""All transformers of one model: mounted once, then brought to what each request wants.

cache-dit's ``enable_cache`` is not used: it keeps its state on classes, cannot be undone in 1.5.1, and tells branches
apart by counting. Its presets and its register of block lists are.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from torch import nn

from ..errors import MountError, reason_of
from . import similarity
from .cached_transformer import CachedTransformer
from .spec import RequestSpec


def preset_mask(preset: str, num_steps: int) -> list[int]:
    """cache-dit's mask for a preset; 1 computed, 0 may be cached."""
    import cache_dit

    mask: list[int] = cache_dit.steps_mask(mask_policy=preset, total_steps=num_steps)
    return mask


class State(Enum):
    """Where a model stands."""

    UNMOUNTED = "unmounted"
    BYPASSED = "bypassed"
    ACTIVE = "active"
    UNMOUNTABLE = "unmountable"


class CachedModel:
    """All transformers of one model. ``prepare`` is the only way to change what their forwards do.

    Args:
        modules: transformers by name.
        pipe: the diffusers pipeline, if there is one.

    Attributes:
        reason: why the model cannot be cached at all.
    """

    def __init__(self, modules: Mapping[str, nn.Module], *, pipe: Any = None):
        self.modules = dict(modules)
        self._pipe = pipe
        self.mounted: dict[str, CachedTransformer] = {}
        self.state = State.UNMOUNTED
        self.reason: str | None = None

    def mount(self) -> None:
        """Prepare every transformer, or none, if not yet tried; afterwards the original forwards still run.

        Raises:
            MountError: the model cannot be cached.
        """
        if self.state is not State.UNMOUNTED:
            return
        try:
            for name, module in self.modules.items():
                self.mounted[name] = CachedTransformer(name, module, self._pipe)
                weights = next(module.parameters(), None)
                if weights is not None and weights.is_floating_point():
                    similarity.prepare(weights.device, weights.dtype)
        except BaseException as error:
            for transformer in self.mounted.values():
                transformer.unmount()
            self.mounted.clear()
            if isinstance(error, MountError):
                self.state, self.reason = State.UNMOUNTABLE, reason_of(error, "blocks")
            raise
        self.state = State.BYPASSED

    def prepare(self, spec: RequestSpec | None) -> None:
        """Make the single transition to ``spec``, or to the original forwards for None.

        Raises:
            MountError: the model or the settings cannot be served cached; the original forwards run.
        """
        if spec is None:
            if self.state is State.ACTIVE:
                self._bypass()
            return
        if self.state is State.UNMOUNTABLE:
            raise MountError(self.reason or "the model cannot be cached")
        self.mount()
        try:
            for name, transformer in self.mounted.items():
                if spec.of(name) is None:
                    transformer.bypass()
                else:
                    transformer.refresh(spec)
        except BaseException:
            # Some transformers may have been refreshed already: no request runs half cached.
            self._bypass()
            raise
        self.state = State.ACTIVE

    def _bypass(self) -> None:
        for transformer in self.mounted.values():
            transformer.bypass()
        self.state = State.BYPASSED

    def identify_outside(self) -> None:
        """Hooks now stand around the transformers; see ``CachedTransformer.identify_outside``."""
        for transformer in self.mounted.values():
            transformer.identify_outside()

    def problem(self) -> str | None:
        """What the forwards so far have shown to be wrong with a mount, None for nothing. Waits for the device."""
        return next((found for each in self.mounted.values() if (found := each.problem()) is not None), None)

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
