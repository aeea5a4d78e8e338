"""Requests are checked here before any worker hears of them. Bad settings, bodies that do not fit and what a worker
refuses are answered with 400 and one line, large bodies with 413; the log has a line for each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.types import Message, Receive

from ..config import effective
from ..config.settings import ALIASES, KNOBS
from ..errors import SettingError, nearest, refusal_in
from ..integration import log
from ..report import metrics
from . import state

MAX_BYTES = 4 << 20
"""Largest body of a request: thousands of times a long prompt."""


class Refusal(BaseModel):
    """Why a request was refused."""

    detail: str = Field(description="One line: field, value, where it came from, what is allowed, a near name.")


RESPONSES: dict[int | str, dict[str, Any]] = {"4XX": {"model": Refusal, "description": "The request was refused."}}


class LoggedError(HTTPException):
    """A refusal of which the log has its line already."""


def refusal(what: str, detail: str, status: int = 400) -> LoggedError:
    """What answers a request that cannot be served: logged.

    Args:
        what: the request's name, or who asked for what.
    """
    log.say("requests", f"{what} refused ({status}): {detail}")
    return LoggedError(status, detail)


def check(request_id: str, **kwargs: Any) -> None:
    """Before ``build_sampling_params``: 400 with one line where a request's cache settings cannot be used."""
    try:
        effective.current().check(kwargs)
    except SettingError as error:
        if state.current().counting:
            metrics.refused()
        raise refusal(f"request {request_id}", str(error)) from None


FIELDS = ("enable_cache_dit", "cache_dit_params")
_CONTAINERS = ("extra_body", "extra_json", "extra_args", "extra_params")
_INSIDE = "settings of the cache stand in cache_dit_params"
_PROFILE = 'this is the switch of SGLang\'s profiler; a profile of the cache is cache_dit_params: {"profile": ...}'


def misplaced(fields: Mapping[str, Any], known: frozenset[str]) -> SettingError | None:
    """What is wrong with fields of a request that the host would leave out without a word; None for nothing.

    Args:
        known: fields that mean something else.
    """
    for name, value in fields.items():
        if name == "profile" and name in known and isinstance(value, str) and value.lower() not in _SWITCH:
            return SettingError(name, value, "request", _PROFILE)
        if name in FIELDS or name in known or not isinstance(name, str):
            continue
        if name in KNOBS or name in ALIASES:
            return SettingError(name, value, "request", _INSIDE)
        plain = name.lower().replace("_", "").replace("-", "")
        near = nearest(name, FIELDS) or ("cache_dit_params" if "cachedit" in plain or plain == "cacheconfig" else None)
        if near is not None:
            return SettingError(name, value, "request", "unknown field", near)
    return None


_SWITCH = {"true", "false", "1", "0", "yes", "no", "y", "n", "t", "f", "on", "off"}


class Fields:
    """Dependency of the host's addresses: 400 for fields that look like ours and are not.

    Args:
        known: the host's own fields.
    """

    def __init__(self, known: frozenset[str]):
        self._known = known

    async def __call__(self, request: Request) -> None:
        if "json" in request.headers.get("content-type", "json"):
            try:
                fields = await request.json()
            except ValueError:
                # Whoever reads the body says so.
                return
        else:
            fields = dict(await request.form())
        if not isinstance(fields, Mapping):
            return
        for each in (fields, *(_mapping(fields.get(name)) for name in _CONTAINERS)):
            if (error := misplaced(each, self._known)) is not None:
                if state.current().counting:
                    metrics.refused()
                raise refusal(asked(request), str(error))


def _mapping(value: Any) -> Mapping[str, Any]:
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, Mapping) else {}


def asked(request: Request) -> str:
    """Who asked for what."""
    return f"{request.method} {request.url.path} from {request.client.host if request.client else 'nowhere'}"


class OneLineRoute(APIRoute):
    """A route whose validation errors become 400 with one line (FastAPI's own are 422 with a list), whose bodies have a
    largest size, and whose refusals are logged.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def one_line(request: Request) -> Response:
            try:
                return await handler(Request(request.scope, limited(request.receive, MAX_BYTES)))
            except RequestValidationError as error:
                raise refusal(asked(request), line(error)) from None
            except HTTPException as error:
                if request.method != "GET" and not isinstance(error, LoggedError):
                    log.say("requests" if error.status_code == 400 else "changes", _refused(request, error))
                raise

        return one_line


def _refused(request: Request, error: HTTPException) -> str:
    return f"{asked(request)} refused ({error.status_code}): {error.detail}"


def limited(receive: Receive, most: int) -> Receive:
    """``receive`` that gives up with 413 after ``most`` bytes, whether or not the body's length was announced."""
    taken = 0

    async def counted() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > most:
            raise HTTPException(status_code=413, detail=f"the body is larger than {most} bytes")
        return message

    return counted


async def answer(request: Request, error: RuntimeError) -> Response:
    """Handler for what the host's addresses raise: a worker's refusal is answered, all else stays what it is."""
    reason = refusal_in(str(error))
    if reason is None or request.scope["type"] != "http":
        raise error
    return JSONResponse({"detail": reason}, status_code=400)


def line(error: RequestValidationError) -> str:
    """The first thing that is wrong, as settings say it."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return "the body is not valid JSON"
    origin, *path = first["loc"]
    if not path:
        return f"the {origin} is missing or not an object"
    field = ".".join(map(str, path))
    if first["type"] == "missing":
        return f"{field} is missing"
    allowed = first["msg"].replace("Input should be", "expected").removeprefix("Value error, ")
    return str(SettingError(field, first["input"], "request" if origin == "body" else origin, allowed))
