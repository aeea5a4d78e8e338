"""``/v1/cache_dit``: what is in force, and changes of a running server that hold for all ranks or for none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastapi import APIRouter, HTTPException, Request

from ..config import effective
from ..config.overrides import MAX_BYTES, Overrides, parse, read_overrides
from ..errors import SettingError, one_line
from ..integration import sglang_api
from . import auth, channel, models
from .validation import limited

router = APIRouter(prefix="/v1/cache_dit", tags=["cache_dit"])

PATIENCE_S = 1.0
"""How long GET waits for the workers; they answer between two requests, which may take minutes."""


@dataclass
class Totals:
    """Requests answered by this server, and the steps of their conditional branches."""

    cached_requests: int = 0
    uncached_requests: int = 0
    computed_steps: int = 0
    cached_steps: int = 0

    def add(self, report: dict[str, Any]) -> None:
        """Count one answer; each of its outputs that ran by itself counts its steps."""
        if report["enabled"]:
            self.cached_requests += 1
        else:
            self.uncached_requests += 1
        for output in report.get("outputs", [report]):
            self.computed_steps += output["computed_steps"]
            self.cached_steps += output["cached_steps"]


class Workers:
    """The last word of the workers, and one question under way at most."""

    def __init__(self) -> None:
        self._replicas: list[dict[str, Any]] | None = None
        self._sent = 0
        self._changes = 0
        self._heard = 0.0
        self._question: asyncio.Task[Any] | None = None

    async def change(self, settings: Any) -> None:
        """Have all workers take ``settings`` (None: those of the start-up) and remember what they say."""
        self._sent += 1
        replicas = await channel.tell("set", settings, self._sent)
        self._changes += 1
        self._keep(replicas)

    async def ask(self) -> None:
        """Ask, and wait a moment; an answer that takes longer is there for the next call."""
        if self._question is None or self._question.done():
            self._question = asyncio.create_task(self._ask())
        await asyncio.wait({self._question}, timeout=PATIENCE_S)

    async def _ask(self) -> None:
        try:
            changes = self._changes
            replicas = await channel.tell("show")
            # Messages keep no order: what is answered after a change may have been said before it.
            if changes == self._changes:
                self._keep(replicas)
        except (channel.ChannelError, ConnectionError) as error:
            sglang_api.logger().warning("cache-dit: the workers did not answer: %s", one_line(error))

    def _keep(self, replicas: list[dict[str, Any]]) -> None:
        self._replicas, self._heard = replicas, time.monotonic()

    def describe(self) -> dict[str, Any] | None:
        """The ``workers`` part of an answer."""
        if self._replicas is None:
            return None
        names = {rank["settings"] for replica in self._replicas for rank in replica["ranks"]}
        consistent = names == {effective.current().fingerprint()}
        age = round(time.monotonic() - self._heard, 3)
        return {"replicas": self._replicas, "age_s": age, "consistent": consistent}


totals = Totals()
workers = Workers()
_turn = asyncio.Lock()


def _state() -> dict[str, Any]:
    current = effective.current()
    return current.describe() | {
        "control": current.overrides.given, "workers": workers.describe(), "totals": asdict(totals),
    }


@router.get("", summary="Settings in force with origins, what is mounted, totals", response_model=models.State)
async def show(request: Request) -> dict[str, Any]:
    """The defaults as a request without ``cache_dit_params`` meets them; the workers' part may be a request old."""
    if request.app.state.disagg_server is None:
        await workers.ask()
    return _state()


_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": models.Refusal, "description": "A setting that cannot be used; nothing was changed."},
    401: {"model": models.Refusal, "description": "The control key is missing or wrong."},
    403: {"model": models.Refusal, "description": "The server has no control key, and the client is elsewhere."},
    413: {"model": models.Refusal, "description": f"The body is larger than {MAX_BYTES} bytes."},
    501: {"model": models.Refusal, "description": "Roles run apart; their settings cannot be changed."},
    503: {"model": models.Refusal, "description": "A worker did not take the change; the old settings were put back."},
}


@router.put(
    "",
    summary="Change the defaults of all ranks and replicas, between two requests",
    response_model=models.State,
    responses=_REFUSALS,
    openapi_extra={"requestBody": {
        "required": True, "content": {"application/json": {"schema": models.schema(models.Change)}},
    }},
)
async def change(request: Request) -> dict[str, Any]:
    """Replace the change before by this one. What it does not name is as at start-up."""
    _check(request)
    body = Request(request.scope, limited(request.receive, MAX_BYTES))
    try:
        overrides = read_overrides(parse(await body.body()), profiles=effective.current().start_up_profiles)
    except SettingError as error:
        raise HTTPException(400, str(error)) from None
    return await _finish(_install(overrides))


@router.delete(
    "", summary="Return to the start-up settings", response_model=models.State,
    responses={status: answer for status, answer in _REFUSALS.items() if status not in (400, 413)},
)
async def reset(request: Request) -> dict[str, Any]:
    """Take the change in force back."""
    _check(request)
    return await _finish(_install(Overrides()))


def _check(request: Request) -> None:
    auth.check(request)
    if request.app.state.disagg_server is not None:
        raise HTTPException(501, "roles that run apart take their settings from their own environment and file")


async def _finish(change: Awaitable[None]) -> dict[str, Any]:
    # A client that goes away must not leave a change half made.
    await asyncio.shield(asyncio.ensure_future(change))
    return _state()


async def _install(overrides: Overrides) -> None:
    """All replicas, then this process; where one fails, all go back."""
    async with _turn:
        before = effective.current().overrides
        try:
            await workers.change(overrides.given)
        except (channel.ChannelError, ConnectionError) as error:
            await _put_back(before)
            raise HTTPException(503, one_line(f"the change was not made: {error}")) from None
        effective.install(replace(effective.current(), overrides=overrides))


async def _put_back(before: Overrides) -> None:
    try:
        await workers.change(before.given)
    except (channel.ChannelError, ConnectionError) as error:
        sglang_api.logger().error("cache-dit: the old settings could not be put back: %s", one_line(error))
