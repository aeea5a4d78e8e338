"""Requests are checked in the HTTP process, before any worker hears of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException

from .. import defaults, metrics
from ..errors import SettingError

_SWITCH = "enable_cache_dit"

counting = False
"""Whether refusals are counted on ``/metrics``."""


def check(request_id: str, **kwargs: Any) -> None:
    """Before ``build_sampling_params``: 400 with one line where a request's cache settings cannot be used."""
    try:
        _check(kwargs)
    except SettingError as error:
        if counting:
            metrics.refused()
        raise HTTPException(status_code=400, detail=str(error)) from None


def check_offline(
    generator: Any, sampling_params_kwargs: Mapping[str, Any] | None = None, external_trace_header: Any = None
) -> None:
    """Before ``DiffGenerator.generate``: SettingError where a request's cache settings cannot be used.

    A generator that uses a server elsewhere leaves it to that server, whose profiles are not known here.
    """
    if generator.local_scheduler_process:
        _check(sampling_params_kwargs or {})


def _check(fields: Mapping[str, Any]) -> None:
    switch = fields.get(_SWITCH)
    if switch is not None and not isinstance(switch, bool):
        raise SettingError(_SWITCH, switch, "request", "expected true or false")
    defaults.current().decide(switch, fields.get("cache_dit_params"))
