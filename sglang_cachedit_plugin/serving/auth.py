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
        if not _is_local(request):
            raise HTTPException(403, f"without {CONTROL_KEY_VARIABLE} only clients on the server's machine may do this")
        return
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    # Both are compared as bytes: compare_digest takes no other text than ASCII.
    if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), key.encode()):
        raise HTTPException(401, "the control key is missing or wrong", headers={"WWW-Authenticate": "Bearer"})


def _is_local(request: Request) -> bool:
    """A client on this machine: not behind a proxy, and no web page of another origin in its browser."""
    if request.client is None or not _is_loopback(request.client.host):
        return False
    if any(name in _PROXIED or name.startswith("x-forwarded-") for name in request.headers):
        return False
    origin = request.headers.get("origin")
    return origin is None or _is_loopback(urlsplit(origin).hostname or "")


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        address = ip_address(name)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
