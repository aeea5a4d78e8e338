"""Settings are checked when a process starts, before any weights load."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from . import defaults, host
from .errors import SettingError
from .sources import read_environment, read_file

_SECTION_FLAGS = {
    "parallelism_config": "--ulysses-degree, --ring-degree or --tp-size",
    "quantize_config": "a quantised checkpoint or --quantization",
    "attention_backend": "--attention-backend",
}


def fail(error: SettingError) -> None:
    """One line on stderr, exit status 2. The host swallows exceptions of plugins, but not SystemExit."""
    print(f"cache-dit: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def read_settings() -> None:
    """Read the environment into this process's defaults; leaves with status 2 if it is not valid."""
    try:
        environment, warnings = read_environment(host_variables=host.known_variables)
    except SettingError as error:
        fail(error)
    for warning in warnings:
        print(f"cache-dit: warning: {warning}", file=sys.stderr, flush=True)
    defaults.install(replace(defaults.current(), environment=environment))


def before_launch(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Before ``launch_server``: leave with status 2 where ``--cache-dit-config`` is not valid."""
    try:
        for warning in ensure_file(server_args):
            print(f"cache-dit: warning: {warning}", file=sys.stderr, flush=True)
    except SettingError as error:
        fail(error)


def ensure_file(server_args: Any) -> tuple[str, ...]:
    """Read ``--cache-dit-config`` into this process's defaults, once; returns warnings.

    Workers get their server arguments ready made, so each process reads the file itself.

    Raises:
        SettingError: a file that cannot be used.
    """
    given = server_args.cache_dit_config
    if not given or defaults.current().file.given == given:
        return ()
    file = read_file(given)
    _refuse_foreign_sections(file.passed_on, server_args)
    defaults.install(replace(defaults.current(), file=file))
    return file.warnings


def _refuse_foreign_sections(sections: Any, server_args: Any) -> None:
    backend = str(getattr(server_args.backend, "value", server_args.backend))
    if backend != "sglang":
        return
    for section, value in sections.items():
        raise SettingError(
            section, value, str(server_args.cache_dit_config),
            f"only the diffusers backend takes this section, use {_SECTION_FLAGS[section]}",
        )

