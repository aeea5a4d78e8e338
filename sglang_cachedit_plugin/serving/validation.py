"""Bodies that do not fit and requests that a worker refuses are answered with 400 and one line, as bad settings are;
large bodies with 413.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.types import Message, Receive

from ..errors import SettingError, refusal_in

MAX_BYTES = 4 << 20
"""Largest body of a request: thousands of times a long prompt."""


class Refusal(BaseModel):
    """Why a request was refused."""

    detail: str = Field(description="One line: field, value, where it came from, what is allowed, a near name.")


RESPONSES: dict[int | str, dict[str, Any]] = {"4XX": {"model": Refusal, "description": "The request was refused."}}


class OneLineRoute(APIRoute):
    """A route whose validation errors become 400 with one line (FastAPI's own are 422 with a list), and whose bodies
    have a largest size.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def one_line(request: Request) -> Response:
            try:
                return await handler(Request(request.scope, limited(request.receive, MAX_BYTES)))
            except RequestValidationError as error:
                raise HTTPException(status_code=400, detail=line(error)) from None

        return one_line


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
