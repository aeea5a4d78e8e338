"""Requests are checked in the HTTP process, before any worker hears of them."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException

from .. import defaults
from ..errors import SettingError

_SWITCH = "enable_cache_dit"


def check(request_id: str, **kwargs: Any) -> None:
    """Before ``build_sampling_params``: 400 with one line where a request's cache settings cannot be used."""
    switch = kwargs.get(_SWITCH)
    try:
        if switch is not None and not isinstance(switch, bool):
            raise SettingError(_SWITCH, switch, "request", "expected true or false")
        defaults.current().decide(switch, kwargs.get("cache_dit_params"))
    except SettingError as error:
        raise HTTPException(status_code=400, detail=str(error)) from None
