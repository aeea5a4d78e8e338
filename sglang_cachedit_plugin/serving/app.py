"""The host's HTTP application, made ready for reports and given the plugin's own addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..integration import startup
from . import answers, control, generate, page, requests, validation


def create(original: Callable[..., Any], server_args: Any, **options: Any) -> Any:
    """Around ``create_app``; this process may be one of its own and reads the config file itself.

    Args:
        options: of the host, which differ between its versions.
    """
    startup.before_launch(server_args)
    requests.counting = bool(server_args.enable_metrics)
    answers.declare_field()
    app = original(server_args, **options)
    app.add_exception_handler(RuntimeError, validation.answer)
    for router in (control.router, page.router, generate.router):
        app.include_router(router)
    return app
