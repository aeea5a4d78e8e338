"""``/v1/cache_dit``: what is in force, and changes of a running server that hold for all ranks or for none."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from fastapi import APIRouter, HTTPException, Request

from ..config import effective
from ..config.json_schema import change_schema
from ..config.sources import MAX_CHANGE_BYTES, Overrides, merged, parse_change, read_overrides
from ..errors import SettingError, one_line
from ..integration import log, sglang_api
from . import auth, channel, models
from .state import ServerState
from .validation import OneLineRoute, asked, limited

router = APIRouter(prefix="/v1/cache_dit", tags=["cache_dit"], route_class=OneLineRoute)


def _describe(server: ServerState) -> dict[str, Any]:
    current = effective.current()
    return current.describe() | {
        "control": current.overrides.given, "workers": server.workers.describe(), "totals": asdict(server.totals),
    }


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What differs between two descriptions of settings."""

    def flat(described: Mapping[str, Any]) -> dict[str, Any]:
        config = {name: entry["value"] for name, entry in described["config"].items()}
        rest = {"enabled": described["enabled"]["value"], **{name: described[name] for name in ("profile", "profiles")}}
        return rest | config

    old, new = flat(before), flat(after)
    # A setting of the second transformer that is not listed is that of the first.
    values = {
        name: [each.get(name, each.get(name.removeprefix("secondary."))) for each in (old, new)]
        for name in {**old, **new}
    }
    return {name: {"before": was, "now": now} for name, (was, now) in values.items() if was != now}


@router.get("", summary="Settings in force with origins, what is mounted, totals", response_model=models.State)
async def show(request: Request) -> dict[str, Any]:
    """The defaults as a request without ``cache_dit_params`` meets them; the workers' part may be a request old."""
    server = request.app.state.cache_dit
    if request.app.state.disagg_server is None:
        await server.workers.ask()
    return _describe(server)


_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": models.Refusal, "description": "A setting that cannot be used; nothing was changed."},
    401: {"model": models.Refusal, "description": "The header Authorization with the control key is missing or wrong."},
    403: {"model": models.Refusal, "description": "The server has no control key, and the client is elsewhere."},
    413: {"model": models.Refusal, "description": f"The body is larger than {MAX_CHANGE_BYTES} bytes."},
    501: {"model": models.Refusal, "description": "Roles run apart; their settings cannot be changed."},
    503: {"model": models.Refusal, "description": "A worker did not take the change; the old settings were put back."},
}


def _body(*, patch: bool) -> dict[str, Any]:
    content = {"application/json": {"schema": change_schema(patch=patch)}}
    return {"requestBody": {"required": True, "content": content}}


@router.put(
    "", summary="Change the defaults of all ranks and replicas, between two requests", response_model=models.State,
    responses=_REFUSALS, openapi_extra=_body(patch=False),
)
async def change(request: Request) -> dict[str, Any]:
    """Replace the change before by this one. What it does not name is as at start-up."""
    return await _change(request)


@router.patch(
    "", summary="Change one thing and keep the rest of the change in force", response_model=models.State,
    responses=_REFUSALS, openapi_extra=_body(patch=True),
)
async def add(request: Request) -> dict[str, Any]:
    """Add to the change in force; what is named here takes the place of what stood there, null takes it back."""
    return await _change(request)


@router.delete(
    "", summary="Return to the start-up settings", response_model=models.State,
    responses={status: answer for status, answer in _REFUSALS.items() if status not in (400, 413)},
)
async def reset(request: Request) -> dict[str, Any]:
    """Take the change in force back."""
    return await _change(request)


async def _change(request: Request) -> dict[str, Any]:
    """All replicas, then this process; where one fails, all go back."""
    auth.check(request)
    if request.app.state.disagg_server is not None:
        raise HTTPException(501, "roles that run apart take their settings from their own environment and file")
    body = None
    if request.method != "DELETE":
        raw = await Request(request.scope, limited(request.receive, MAX_CHANGE_BYTES)).body()
        try:
            body = parse_change(raw)
        except SettingError as error:
            raise HTTPException(400, str(error)) from None
    # A client that goes away must not leave a change half made.
    return await asyncio.shield(asyncio.ensure_future(_install(request, body)))


async def _install(request: Request, body: Any) -> dict[str, Any]:
    server = request.app.state.cache_dit
    async with server.turn:
        before = effective.current()
        try:
            if request.method == "PATCH":
                body = merged(before.overrides.given, body)
            overrides = (
                Overrides() if request.method == "DELETE" else read_overrides(body, profiles=before.start_up_profiles)
            )
        except SettingError as error:
            raise HTTPException(400, str(error)) from None
        try:
            await server.workers.change(overrides.given)
        except (channel.ChannelError, ConnectionError) as error:
            await _put_back(server, before.overrides)
            raise HTTPException(503, one_line(f"the change was not made: {error}")) from None
        effective.install(replace(effective.current(), overrides=overrides))
        server.workers.settled()
    changed = differences(before.describe(), effective.current().describe())
    said = ", ".join(f"{name} {each['before']!r} -> {each['now']!r}" for name, each in changed.items())
    log.say("changes", f"{asked(request)}: {said or 'nothing changed'}")
    return _describe(server) | {"changed": changed}


async def _put_back(server: ServerState, before: Overrides) -> None:
    try:
        await server.workers.change(before.given)
    except (channel.ChannelError, ConnectionError) as error:
        sglang_api.logger().error("cache-dit: the old settings could not be put back: %s", one_line(error))
        server.workers.settled(False)
    else:
        server.workers.settled()
