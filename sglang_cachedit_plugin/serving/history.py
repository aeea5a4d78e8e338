"""The last requests that this server process answered, for the page."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

LENGTH = 50


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


history = History()
