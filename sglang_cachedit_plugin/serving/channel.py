"""Control messages over the host's own scheduler channel, and what a rank does with one.

A message reaches the scheduler of every data-parallel replica in the queue of its requests, and every rank of the
replica in the host's broadcast: it is handled between two requests. The HTTP process and the workers exchange plain
JSON text inside one object of the host's pickled protocol.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config import effective
from ..config.effective import Defaults
from ..config.sources import Overrides, read_overrides
from ..errors import CacheDitError, one_line
from ..integration import sglang_api, startup
from ..integration.request import describe_models


@dataclass
class CacheDitControl:
    """One message: JSON text of ``{"do": "show"}`` or ``{"do": "set", "settings": mapping or null, "number": n}``.

    Each message has a socket of its own, and sockets keep no order: a worker refuses a change with a lower number
    than one that it made.
    """

    text: str


class ChannelError(CacheDitError):
    """A replica did not do what it was told."""


async def tell(do: str, settings: Any = None, number: int = 0) -> list[dict[str, Any]]:
    """What every replica answers to ``do``: its number, and for each of its ranks settings and mounted models.

    Args:
        number: of a change; later ones have higher numbers.

    Raises:
        ChannelError: a replica failed; the others may have done it.
    """
    message = CacheDitControl(json.dumps({"do": do, "settings": settings, "number": number}))
    replicas = []
    for replica, answer in enumerate(await sglang_api.tell_replicas(message)):
        error = str(answer) or type(answer).__name__ if isinstance(answer, BaseException) else _error_of(answer)
        if error is not None:
            raise ChannelError(one_line(f"replica {replica}: {error}"))
        replicas.append({"replica": replica, "ranks": json.loads(answer.output)})
    return replicas


def _error_of(answer: Any) -> str | None:
    if not isinstance(getattr(answer, "output", None), str):
        return getattr(answer, "error", None) or "it does not know this message"
    return answer.error


def dispatch(original: Callable[..., Any], scheduler: Any, req_or_group: Any) -> Any:
    """Around ``Scheduler._dispatch_single_request``: control messages are handled here, on every rank."""
    if type(req_or_group) is not CacheDitControl:
        return original(scheduler, req_or_group)
    return handle(scheduler.server_args, req_or_group.text)


def handle(server_args: Any, text: str) -> Any:
    """Check on every rank of the replica, then do it on all of them or on none."""
    changed, error = _read(server_args, text)
    errors = [each for each in sglang_api.gather_replica(error) if each is not None]
    if errors:
        return sglang_api.answer(None, errors[0])
    if changed is not None:
        effective.install(changed)
    state = {"rank": sglang_api.rank(), "settings": effective.current().fingerprint(), "mounted": describe_models()}
    return sglang_api.answer(json.dumps(sglang_api.gather_replica(state)))


def _read(server_args: Any, text: str) -> tuple[Defaults | None, str | None]:
    """The settings after the message (None: as they are), or what is wrong with it."""
    try:
        startup.ensure_file(server_args)
        message = json.loads(text)
        if message["do"] != "set":
            return None, None
        current, number = effective.current(), message["number"]
        if number <= current.change:
            return None, f"change {number} came after change {current.change}"
        given = message["settings"]
        overrides = Overrides() if given is None else read_overrides(given, profiles=current.start_up_profiles)
        return current.with_overrides(overrides, number), None
    except (CacheDitError, ValueError, KeyError, TypeError) as error:
        return None, str(error) or type(error).__name__
