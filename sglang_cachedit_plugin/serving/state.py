"""What the HTTP process keeps: totals, the last requests, the last word of the workers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from ..config import effective
from ..errors import one_line
from ..integration import sglang_api
from ..report import metrics
from . import channel

LENGTH = 50
"""Requests that the page shows."""
MOST_APART = 1000
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


class History:
    """A ring of reports; each has a number that only grows, so that a reader can ask for what is new."""

    def __init__(self, length: int = LENGTH):
        self._entries: deque[dict[str, Any]] = deque(maxlen=length)
        self._last = 0
        self._lock = threading.Lock()
        self._started = time.time()

    def add(self, request_id: str, report: dict[str, Any]) -> None:
        """Keep one report, without its settings: fifty copies of them are no news."""
        kept = {name: value for name, value in report.items() if name not in ("config", "outputs")}
        with self._lock:
            self._last += 1
            self._entries.append({
                "n": self._last, "id": request_id, "time": round(time.time(), 3), "report": kept,
                "outputs": len(report.get("outputs", [report])),
                "speed_up": speed_up(report["computed_steps"], report["cached_steps"]),
            })

    def since(self, number: int) -> dict[str, Any]:
        """Entries later than ``number``, oldest first.

        ``started`` differs after a restart, when numbers begin anew.
        """
        with self._lock:
            entries = [entry for entry in self._entries if entry["n"] > number]
            return {"started": self._started, "last": self._last, "requests": entries}


def speed_up(computed: int, cached: int) -> float | None:
    """How much faster denoising is at most: all steps over the computed ones, as if cached ones were free."""
    return round((computed + cached) / computed, 3) if computed else None


class Workers:
    """The last word of the workers, and one question under way at most.

    Args:
        counting: whether ``/metrics`` says if they agree.
    """

    def __init__(self, counting: bool = False) -> None:
        self._counting = counting
        self._replicas: list[dict[str, Any]] | None = None
        self._sent = 0
        self._changes = 0
        self._heard = 0.0
        self._question: asyncio.Task[Any] | None = None
        self._agree(True)

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
                self.settled()
        except (channel.ChannelError, ConnectionError) as error:
            sglang_api.logger().warning("cache-dit: the workers did not answer: %s", one_line(error))

    def _keep(self, replicas: list[dict[str, Any]]) -> None:
        self._replicas, self._heard = replicas, time.monotonic()

    def settled(self, agreed: bool = True) -> None:
        """No change is under way: tell ``/metrics`` whether all workers hold this process's settings.

        Args:
            agreed: False where a change could not be taken back.
        """
        self._agree(agreed and (self._replicas is None or self._consistent()))

    def _agree(self, consistent: bool) -> None:
        if self._counting:
            metrics.agree(consistent)

    def _consistent(self) -> bool:
        names = {rank["settings"] for replica in self._replicas or () for rank in replica["ranks"]}
        return names == {effective.current().fingerprint()}

    def describe(self) -> dict[str, Any] | None:
        """The ``workers`` part of an answer."""
        if self._replicas is None:
            return None
        age = round(time.monotonic() - self._heard, 3)
        return {"replicas": self._replicas, "age_s": age, "consistent": self._consistent()}


@dataclass
class ServerState:
    """One server.

    Args:
        counting: whether refusals are counted on ``/metrics``.
        apart: reports of denoisers that run apart, by request, until the answer takes them.
        turn: held by the change under way.
    """

    counting: bool = False
    totals: Totals = field(default_factory=Totals)
    history: History = field(default_factory=History)
    apart: dict[str, dict[str, Any]] = field(default_factory=dict)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    workers: Workers = field(init=False)

    def __post_init__(self) -> None:
        self.workers = Workers(self.counting)

    def count(self, request_id: str, report: dict[str, Any]) -> None:
        """Keep the report of an answer."""
        self.totals.add(report)
        self.history.add(request_id, report)

    def remember(self, request_id: str, report: dict[str, Any]) -> None:
        """Keep the report of a denoiser that runs apart; of requests that nobody waits for any more the oldest goes."""
        while len(self.apart) >= MOST_APART:
            self.apart.pop(next(iter(self.apart)), None)
        self.apart[request_id] = report


_current = ServerState()


def current() -> ServerState:
    """The state of this process's server, for hooks: the host does not tell them its application."""
    return _current


def install(app: Any, state: ServerState) -> None:
    """``state`` is that of ``app``, which this process serves."""
    global _current
    app.state.cache_dit = _current = state
