"""The offline engine and ``sglang generate``: bad settings as errors, a table after each request."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from ..config import effective
from ..errors import RefusedError, refusal_in
from ..report import table
from ..report.stats import reports_of
from . import sglang_api

_refusals: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def generate(
    original: Callable[..., Any], generator: Any, sampling_params_kwargs: Mapping[str, Any] | None = None,
    external_trace_header: Any = None,
) -> Any:
    """Around ``DiffGenerator.generate``, which logs a worker's error and returns None.

    A generator that uses a server elsewhere leaves the check to that server, whose profiles are not known here.

    Raises:
        SettingError: cache settings of the request cannot be used.
        RefusedError: a worker found that out, for all prompts.
    """
    if generator.local_scheduler_process:
        effective.current().check(sampling_params_kwargs or {})
    _refusals.pop(generator, None)
    result = original(generator, sampling_params_kwargs, external_trace_header)
    if result is None and (reason := _refusals.pop(generator, None)) is not None:
        raise RefusedError(reason)
    return result


def answered(result: Any, generator: Any, batch: Any) -> None:
    """After the offline engine had its answer: log the request's steps and residual differences.

    The engine of a server's workers never comes here, so servers keep to one line a request.
    """
    if (reason := refusal_in(str(getattr(result, "error", None) or ""))) is not None:
        _refusals[generator] = reason
    found = table.lines(reports_of(result))
    if found and not any(map(sglang_api.serves_nobody, batch)):
        sglang_api.logger().info("\n".join(["cache-dit: steps and residual differences", *found]))
