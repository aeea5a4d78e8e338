"""The offline engine and ``sglang generate``: a table after each request."""

from __future__ import annotations

from typing import Any

from . import host, table
from .stats import reports_of


def print_table(result: Any, generator: Any, batch: Any) -> None:
    """After the offline engine had its answer: log the request's steps and residual differences.

    The engine of a server's workers never comes here, so servers keep to one line a request.
    """
    found = table.lines(reports_of(result))
    if found and not any(map(host.serves_nobody, batch)):
        host.logger().info("\n".join(["cache-dit: steps and residual differences", *found]))
