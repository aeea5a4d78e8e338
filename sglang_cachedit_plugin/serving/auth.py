"""Who may change a running server.

With a key (the host's ``api_key`` where it has one, otherwise the variable ``SGLANG_CACHE_DIT_CONTROL_KEY``) every
change carries it as a bearer token. Without one, only clients on the server's own machine may change anything.
"""

from __future__ import annotations

import hmac
import os
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException, Request

from ..config.sources import CONTROL_KEY_VARIABLE

_PROXIED = ("forwarded", "via", "x-real-ip")


def required_key(server_args: Any) -> str | None:
    """The key that changes need, None where there is none."""
    return getattr(server_args, "api_key", None) or os.environ.get(CONTROL_KEY_VARIABLE) or None


def check(request: Request) -> None:
    """Let a change pass, or answer 401 (key missing or wrong) or 403 (no key, and not from this machine)."""
    key = required_key(request.app.state.server_args)
    if key is None:
        if (why := _elsewhere(request)) is not None:
            raise HTTPException(
                403, f"{why}: without {CONTROL_KEY_VARIABLE} only clients on the server's machine may do this; set it "
                "there, and send it as the header Authorization: Bearer KEY"
            )
        return
    given = request.headers.get("authorization", "")
    scheme, _, token = given.partition(" ")
    # Both are compared as bytes: compare_digest takes no other text than ASCII.
    if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), key.encode()):
        wrong = "has another key or form" if given else "is missing"
        detail = f"the header Authorization {wrong}, expected: Bearer KEY with the server's control key"
        raise HTTPException(401, detail, headers={"WWW-Authenticate": "Bearer"})


def _elsewhere(request: Request) -> str | None:
    """Why a client is not one of this machine, None where it is: it came through a proxy, or is a web page of another
    origin in a browser of this machine.
    """
    if request.client is None or not _is_loopback(request.client.host):
        return f"the client is at {request.client.host if request.client else 'an unknown address'}"
    for name in request.headers:
        if name in _PROXIED or name.startswith("x-forwarded-"):
            return f"the header {name.title()} says that a proxy sent this"
    origin = request.headers.get("origin")
    if origin is not None and not _is_loopback(urlsplit(origin).hostname or ""):
        return "the header Origin says that a web page of another server sent this"
    return None


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        address = ip_address(name)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
