"""The host's HTTP application, made ready for reports and given the plugin's own addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..integration import log, startup
from . import control, generate, page, responses, state, validation


def create(original: Callable[..., Any], server_args: Any, **options: Any) -> Any:
    """Around ``create_app``; this process may be one of its own and reads the config file itself.

    Args:
        options: of the host, which differ between its versions.
    """
    startup.check(server_args)
    responses.declare()
    app = original(server_args, **options)
    log.leave_out_refusals()
    state.install(app, state.ServerState(counting=bool(server_args.enable_metrics)))
    app.add_exception_handler(RuntimeError, validation.answer)
    for router in (control.router, page.router, generate.router):
        app.include_router(router)
    page.serve_documents(app, responses.describe_requests)
    return app
