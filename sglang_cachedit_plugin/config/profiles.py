"""Profiles that every server knows: ``quality``, ``balanced`` and ``fast``. Each is an error tolerance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .sources import Source, read_request

KNOBS_OF: Mapping[str, Mapping[str, Any]] = {
    "quality": {"error_tolerance": 0.003}, "balanced": {"error_tolerance": 0.01}, "fast": {"error_tolerance": 0.08},
}
"""Chosen by measurement on the demo models, see docs/quality.md."""

BUILT_IN: Mapping[str, Source] = {
    name: read_request(knobs, origin=f"built-in profiles.{name}") for name, knobs in KNOBS_OF.items()
}
