"""Entry point ``cachedit`` of group ``sglang.multimodal_gen.plugins``."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from typing import Any

from . import hooks, versions


def register() -> None:
    """Register the hooks. The host calls this once in every process; it must not import the runtime.

    A host whose seams differ is left alone altogether, with one line saying which seam.
    """
    problems, unknown = hooks.mismatches(hooks.host_root()), "; ".join(versions.untried())
    if problems:
        _warn("this host is not one the plugin knows, it is left unpatched: " + "; ".join(problems))
        return
    if unknown and multiprocessing.parent_process() is None:
        # Workers are spawned: once is enough.
        _warn(f"{unknown}; all that the plugin needs is there, so it works")
    from . import startup

    startup.read_settings()
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    hooks.register(HookRegistry, HookType)


def out_of_place(registry: Any) -> list[str]:
    """A line for each seam that the host did not hook, or where another plugin's replacement stands in our place.

    The host only logs either, at the start.
    """
    given, patched = getattr(registry, "_hooks", None), getattr(registry, "_patched", None)
    if given is None or patched is None:
        return []
    found = []
    for seam in hooks.SEAMS:
        replacing = [(hook, source) for kind, hook, source in given.get(seam.target, ()) if kind.name == "REPLACE"]
        if seam.target not in patched:
            found.append(f"{seam.target}: the host could not hook it, see its log")
        elif seam.kind == "replace" and replacing[-1][0].__module__ != hooks.__name__:
            name = getattr(replacing[-1][1], "plugin_name", None)
            found.append(f"{seam.target}: the plugin {name!r} put its own in place of ours")
    return found


def start_worker(original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the load of a worker's model: settings first; afterwards what keeps the plugin from its work is named.

    Raises:
        MountError: with ``strict``, a model that cannot be cached.
    """
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry

    from . import denoising, host, startup

    startup.ensure_file(worker.server_args)
    result = original(worker, *args, **kwargs)
    if host.is_first_rank():
        for problem in out_of_place(HookRegistry):
            host.logger().warning("cache-dit: %s", problem)
    denoising.check_worker(worker)
    return result


def _warn(text: str) -> None:
    print(f"cache-dit: warning: {text}", file=sys.stderr, flush=True)
