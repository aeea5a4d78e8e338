"""Settings are checked when a process starts, before any weights load."""

from __future__ import annotations

import sys
from typing import Any

from . import defaults, host
from .defaults import Defaults
from .errors import SettingError
from .sources import read_environment, read_file

_SECTION_FLAGS = {
    "parallelism_config": "--ulysses-degree, --ring-degree or --tp-size",
    "parallel_kwargs": "--ulysses-degree, --ring-degree or --tp-size",
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
    defaults.install(Defaults(environment=environment, file=defaults.current().file))


def server_args_ready(result: Any, server_args: Any) -> None:
    """After ``ServerArgs.__post_init__``: read ``--cache-dit-config``."""
    given = server_args.cache_dit_config
    if not given:
        return
    try:
        file = read_file(given)
        _refuse_foreign_sections(file.passed_on, server_args)
    except SettingError as error:
        fail(error)
    for warning in file.warnings:
        print(f"cache-dit: warning: {warning}", file=sys.stderr, flush=True)
    defaults.install(Defaults(environment=defaults.current().environment, file=file))


def _refuse_foreign_sections(sections: Any, server_args: Any) -> None:
    backend = str(getattr(server_args.backend, "value", server_args.backend))
    if backend == "diffusers":
        return
    for section, value in sections.items():
        raise SettingError(
            section, value, str(server_args.cache_dit_config),
            f"only the diffusers backend takes this section, use {_SECTION_FLAGS[section]}",
        )


def ensure_file(server_args: Any) -> None:
    """Read the file in a process that got its server arguments ready made, as workers do."""
    if server_args.cache_dit_config and defaults.current().file.given != server_args.cache_dit_config:
        server_args_ready(None, server_args)
