"""Settings are checked when a process starts, before any weights load."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from ..config import diffusers_sections, effective
from ..config.sources import FileConfig, file_label, read_environment, read_file
from ..errors import SettingError, one_line
from . import log, sglang_api


def fail(error: SettingError) -> None:
    """One line on stderr, exit status 2. The host swallows exceptions of plugins, but not SystemExit."""
    print(f"cache-dit: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def warn(text: str) -> None:
    """One line on stderr."""
    print(f"cache-dit: warning: {text}", file=sys.stderr, flush=True)


def read_settings() -> None:
    """Read the environment into this process's defaults; leaves with status 2 if it is not valid."""
    try:
        environment, warnings = read_environment(host_variables=sglang_api.known_variables)
    except SettingError as error:
        fail(error)
    for warning in warnings:
        warn(one_line(warning))
    effective.install(replace(effective.current(), environment=environment))


class ReadFile(str):
    """Path of a config file, with what stood in it at launch: processes that get it do not open the file again."""

    config: FileConfig


def before_launch(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Before workers start: check the settings, and say what they are."""
    check(server_args)
    if log.wanted("changes") and multiprocessing.parent_process() is None and (line := start_line()):
        # The host sets its log up later.
        print(line, file=sys.stderr, flush=True)


def start_line() -> str | None:
    """Whether requests are cached and where that comes from; None where nothing of the cache was set at all."""
    current = effective.current()
    environment, given = current.environment, current.file.given
    variables = len([*environment.primary, *environment.secondary])
    variables += sum(each is not None for each in (environment.enabled, environment.profile))
    if not given and not variables:
        return None
    described = current.describe()
    origin, profile = described["enabled"]["origin"], described["profile"]
    parts = ["on" if current.enabled else "off"]
    if current.enabled and profile:
        parts.append(f"profile {profile}")
    elif not current.enabled:
        parts.append("nothing switches it on" if origin == "default" else f"{origin} says no")
    if given:
        parts.append(f"from {file_label(given)}")
    told = f"; {variables} variable{'s' * (variables > 1)} from the environment" if variables else ""
    return one_line(f"cache-dit: {', '.join(parts)}{told}")


def check(server_args: Any) -> None:
    """Leave with status 2 where ``--cache-dit-config`` is not valid, else hand it on read."""
    try:
        for warning in ensure_file(server_args, anew=True):
            warn(one_line(warning))
        effective.current().check_profiles()
    except SettingError as error:
        fail(error)
    if isinstance(given := server_args.cache_dit_config, str) and given:
        server_args.cache_dit_config = ReadFile(given)
        server_args.cache_dit_config.config = effective.current().file
    _leave_out_graphs(server_args)


def _leave_out_graphs(server_args: Any) -> None:
    """CUDA graphs that the host has chosen by itself make way for caching that cannot run around them.

    The host does not choose them where its own variable switches caching on.
    """
    if not server_args.enable_breakable_cuda_graph or not effective.current().enabled:
        return
    if server_args.is_arg_explicitly_set("enable_breakable_cuda_graph"):
        return
    # Imported here: graphs bring torch, and this module is loaded while plugins register.
    from . import cuda_graphs

    if not cuda_graphs.fits(effective.current().decide(None, None)):
        server_args.enable_breakable_cuda_graph = False
        sglang_api.logger().info(
            "cache-dit: breakable CUDA graphs are left out, all requests are cached; --enable-breakable-cuda-graph "
            "true keeps them"
        )


def ensure_file(server_args: Any, *, anew: bool = False) -> tuple[str, ...]:
    """Take ``--cache-dit-config`` into this process's defaults, once; returns warnings.

    Args:
        anew: read a file that was not handed on read, even if it was read before.

    Raises:
        SettingError: a file that cannot be used.
    """
    given, current = server_args.cache_dit_config, effective.current()
    handed_on = given.config if isinstance(given, ReadFile) else None
    if not given or handed_on is current.file or (handed_on is None and not anew and current.file.given == given):
        return ()
    file = handed_on or _read(given, server_args)
    effective.install(replace(current, file=file))
    return file.warnings


def _read(given: str | Mapping[str, Any], server_args: Any) -> FileConfig:
    file = read_file(given)
    return replace(file, passed_on=_fitting(file.passed_on, server_args)) if file.passed_on else file


def _fitting(sections: Mapping[str, Any], server_args: Any) -> Mapping[str, Any]:
    """``sections`` with their sizes resolved; whatever can be refused before weights load is refused here."""
    label = file_label(server_args.cache_dit_config)
    if str(getattr(server_args.backend, "value", server_args.backend)) == "sglang":
        section, value = next(iter(sections.items()))
        use = diffusers_sections.native_flags(section, value)
        raise SettingError(
            section, value, label, "only the diffusers backend takes this section" + (f", use {use}" if use else "")
        )
    sections = diffusers_sections.fit(
        sections, server_args.num_gpus, sglang_api.machine(), label, sglang_api.explicit_flags(server_args)
    )
    if "parallelism_config" in sections:
        check_classes(sections, sglang_api.transformer_classes(server_args.model_path), label)
    return sections


def check_classes(sections: Mapping[str, Any], classes: Collection[str], label: str) -> None:
    """Refuse a way of splitting that cache-dit does not have for one of these transformer classes."""
    if (parallelism := sections.get("parallelism_config")) is None:
        return
    # Imported here: cache-dit brings torch, and this module is loaded while plugins register.
    from . import cache_dit_sections

    for name in sorted(classes):
        diffusers_sections.check_family(parallelism, name, cache_dit_sections.splits, f"{label} parallelism_config")
