"""Entry point ``cachedit`` of group ``sglang.multimodal_gen.plugins``."""

from __future__ import annotations

import multiprocessing
import sys

from . import hooks
from .integration import versions


def register() -> None:
    """Register the hooks. The host calls this once in every process; it must not import the runtime.

    A host whose hook points differ is left alone altogether, with one line saying which hook point.
    """
    problems, unknown = hooks.mismatches(hooks.host_root()), "; ".join(versions.untried())
    if problems:
        _warn("this host is not one the plugin knows, it is left unpatched: " + "; ".join(problems))
        return
    if unknown and multiprocessing.parent_process() is None:
        # Workers are spawned: once is enough.
        _warn(f"{unknown}; all that the plugin needs is there, so it works")
    from .integration import startup

    startup.read_settings()
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    hooks.register(HookRegistry, HookType)


def _warn(text: str) -> None:
    print(f"cache-dit: warning: {text}", file=sys.stderr, flush=True)
