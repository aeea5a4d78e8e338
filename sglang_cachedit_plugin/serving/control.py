"""``GET /v1/cache_dit``: settings in force with their origins, and totals since this server started."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fastapi import APIRouter

from .. import defaults

router = APIRouter(prefix="/v1/cache_dit", tags=["cache_dit"])


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


totals = Totals()


@router.get("", summary="Settings of requests that say nothing, with origins; profiles; totals")
async def show() -> dict[str, Any]:
    """The server's defaults as a request without ``cache_dit_params`` meets them."""
    return defaults.current().describe() | {"totals": asdict(totals)}
