"""What the log says of caching, as ``SGLANG_CACHE_DIT_LOG`` has it: one line a request, one a change, one at start."""

from __future__ import annotations

import logging
import os

from ..config.sources import LOG_LEVELS, LOG_VARIABLE
from ..errors import one_line, refusal_in
from . import sglang_api


def wanted(kind: str) -> bool:
    """Whether lines of a kind are: ``requests`` or ``changes``."""
    level = os.environ.get(LOG_VARIABLE, "").strip() or LOG_LEVELS[0]
    return LOG_LEVELS.index(level) <= LOG_LEVELS.index(kind)


def say(kind: str, text: str) -> None:
    """Write a line of this kind, where those are wanted."""
    if wanted(kind):
        sglang_api.logger().info(one_line(f"cache-dit: {text}"))


class _WithoutRefusals(logging.Filter):
    """Leaves out what the host says of a request that was refused: it takes a refusal for a failure of its own and
    writes its traceback, in several places. The request's own line says it.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return refusal_in(record.getMessage()) is None and refusal_in(str(error)) is None


def leave_out_refusals() -> None:
    """From now on in this process, once its log is set up."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(each, _WithoutRefusals) for each in handler.filters):
            handler.addFilter(_WithoutRefusals())
