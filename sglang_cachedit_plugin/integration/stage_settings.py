"""What a stage of the host wants, refuses and configures by itself."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..config.settings import KNOBS
from ..config.sources import Layer, Source, Value
from . import native_stages, sglang_api

CONFIGURES = ("_build_cache_dit_config", "_cache_dit_scm_masks")
"""Methods with which a stage replaces the settings that it was given."""


def refusal(stage: Any) -> str:
    """Why a request runs uncached that the stage does not want cached."""
    loop = native_stages.of(type(stage))
    when = f": {loop.refuses}" if loop is not None and loop.refuses else ""
    return f"{type(stage).__name__} keeps this request uncached{when}"


def source(stage: Any, steps: int | tuple[int, int], *, wanted: bool) -> Source:
    """The stage's own settings and wish for the request under way.

    Args:
        steps: of the transformer, or of the high and the low noise expert.
        wanted: the stage asks for caching.
    """
    origin = f"stage {type(stage).__name__}"
    enabled = Value(True, origin) if wanted else None
    if not wanted or not any(sglang_api.overrides(stage, name) for name in CONFIGURES):
        return Source(enabled=enabled)
    counts = stage._cache_dit_step_counts(steps)
    _, policy, *masks = stage._cache_dit_scm_masks(*counts)
    layers = [
        _layer(stage, count, mask, policy, bool(second), origin)
        for second, (count, mask) in enumerate(zip(counts, masks, strict=True))
    ]
    return Source(primary=layers[0], secondary=layers[1], enabled=enabled)


def _layer(stage: Any, steps: int | None, mask: Any, policy: str, second: bool, origin: str) -> Layer:
    """The config that the stage builds, where it differs from the one that nobody has touched."""
    if steps is None:
        return {}
    config = stage._build_cache_dit_config(steps, mask, policy, secondary=second)
    if config == sglang_api.untouched_config(steps):
        return {}
    given = {each.name: getattr(config, each.name) for each in fields(config)}
    return {
        name: Value(knob.check(name, given[name], origin), origin)
        for name, knob in KNOBS.items()
        # The number of steps is the request's, not what a mask was written for.
        if name != "num_inference_steps" and given.get(name) is not None
    }
