"""Requests are checked in the HTTP process, before any worker hears of them."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException

from ..config import effective
from ..errors import SettingError
from ..report import metrics

counting = False
"""Whether refusals are counted on ``/metrics``."""


def check(request_id: str, **kwargs: Any) -> None:
    """Before ``build_sampling_params``: 400 with one line where a request's cache settings cannot be used."""
    try:
        effective.current().check(kwargs)
    except SettingError as error:
        if counting:
            metrics.refused()
        raise HTTPException(status_code=400, detail=str(error)) from None
