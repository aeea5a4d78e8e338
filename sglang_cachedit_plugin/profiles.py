"""Profiles that every server knows: ``quality``, ``balanced`` and ``fast``. They are not tuned to a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .sources import Source, read_request

_FORECAST = {"forecast": "output", "forecast_order": 1, "steps_computation_policy": "static"}

KNOBS_OF: Mapping[str, Mapping[str, Any]] = {
    "quality": {**_FORECAST, "steps_computation_mask": "slow", "max_warmup_steps": 4},
    "balanced": {**_FORECAST, "steps_computation_mask": "medium"},
    "fast": {**_FORECAST, "steps_computation_mask": "fast"},
}

BUILT_IN: Mapping[str, Source] = {
    name: read_request(knobs, origin=f"built-in profiles.{name}") for name, knobs in KNOBS_OF.items()
}
