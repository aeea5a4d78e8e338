"""``GET /cache_dit``: a page to look at while the server works, the endpoint that it asks for news, and ``/docs``."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field

from .state import speed_up
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
    request: Request,
    since: Annotated[int, Query(ge=0, description="Only requests with a greater number.")] = 0,
) -> Requests:
    """Reports of the last requests that this server process answered, and totals. Prompts are not kept."""
    server = request.app.state.cache_dit
    bound = speed_up(server.totals.computed_steps, server.totals.cached_steps)
    return Requests(totals=asdict(server.totals), speed_up=bound, **server.history.since(since))


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


_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Addresses of this server</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,"><style>
:root { color-scheme: light dark } body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 60rem }
td, th { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; overflow-wrap: anywhere }
summary { cursor: pointer; padding: .3rem 0 }</style><h1>Addresses of this server</h1>
<p><a href="cache_dit">What the cache does</a>, <a href="openapi.json">OpenAPI</a>,
and <a href="docs/swagger">Swagger</a>, which loads from the internet.</p>"""


def serve_documents(app: Any, describe: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """``/docs`` that loads nothing from elsewhere in place of Swagger, which moves to ``/docs/swagger``.

    Args:
        describe: changes the OpenAPI document once it is made.
    """
    own, described = app.openapi, functools.cache(lambda: describe(own()))
    app.openapi = described
    app.router.routes[:] = [each for each in app.router.routes if getattr(each, "path", None) != "/docs"]

    @app.get("/docs", include_in_schema=False)
    async def documents() -> HTMLResponse:
        return HTMLResponse(_HEAD + "".join(_operations(described())))

    @app.get("/docs/swagger", include_in_schema=False)
    async def swagger() -> HTMLResponse:
        return get_swagger_ui_html(openapi_url="../openapi.json", title=app.title)


def _operations(document: dict[str, Any]) -> Iterator[str]:
    schemas, text = document.get("components", {}).get("schemas", {}), html.escape
    for path, methods in sorted(document["paths"].items(), key=lambda each: ("cache_dit" not in each[0], each[0])):
        for method, operation in methods.items():
            summary, more = (text(operation.get(name, "")) for name in ("summary", "description"))
            yield f"<details><summary><b>{method.upper()} {text(path)}</b> {summary}</summary><p>{more}</p><table>"
            fields = {each["name"]: each["schema"] | each for each in operation.get("parameters", ())}
            for content in operation.get("requestBody", {}).get("content", {}).values():
                schema = content["schema"]
                fields |= schemas.get(schema.get("$ref", "").rpartition("/")[2], schema).get("properties", {})
            for name, field in fields.items():
                kinds = field.get("anyOf", [field])
                kind = " or ".join(str(each.get("type") or each.get("enum") or "object") for each in kinds)
                default = f", default {json.dumps(field['default'])}" if field.get("default") is not None else ""
                yield f"<tr><th>{text(name)}<td>{text(kind + default)}<td>{text(field.get('description', ''))}"
            yield "</table></details>"
