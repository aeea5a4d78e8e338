"""``GET /cache_dit``: a page to look at while the server works, and the endpoint that it asks for news."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from dataclasses import asdict
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field

from . import control
from .history import history, speed_up
from .validation import RESPONSES, OneLineRoute

router = APIRouter(tags=["cache_dit"], route_class=OneLineRoute)


class Entry(BaseModel):
    """One request that was answered."""

    n: int = Field(description="Its number since the server started.")
    id: str
    time: float = Field(description="Seconds since 1970, when it was answered.")
    outputs: int = Field(description="Outputs that ran by themselves; the report is the first one's.")
    speed_up: float | None = Field(description="Steps divided by computed steps: the bound, were a cached step free.")
    report: dict[str, Any] = Field(description="Field `cache_dit` of its answer, without the settings.")


class Requests(BaseModel):
    """What is new since a number."""

    started: float = Field(description="Seconds since 1970; differs after a restart, when numbers begin anew.")
    last: int = Field(description="The latest number, for the next question.")
    totals: dict[str, int]
    speed_up: float | None = Field(description="The bound over all steps of the totals.")
    requests: list[Entry] = Field(description="Oldest first, the last 50 at most.")


@router.get("/v1/cache_dit/requests", summary="The last 50 requests: steps, differences, time", responses=RESPONSES)
async def requests(
    since: Annotated[int, Query(ge=0, description="Only requests with a greater number.")] = 0,
) -> Requests:
    """Reports of the last requests that this server process answered, and totals. Prompts are not kept."""
    totals = asdict(control.totals)
    bound = speed_up(control.totals.computed_steps, control.totals.cached_steps)
    return Requests(totals=totals, speed_up=bound, **history.since(since))


@router.get("/cache_dit", summary="A live page of settings and requests", response_class=HTMLResponse)
async def page() -> HTMLResponse:
    """One file without outside addresses; it only reads."""
    text, policy = _page()
    return HTMLResponse(text, headers={
        "content-security-policy": policy, "cache-control": "no-cache", "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    })


@functools.cache
def _page() -> tuple[str, str]:
    """The file, and a policy under which nothing but its own script and style runs."""
    text = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    return text, (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
