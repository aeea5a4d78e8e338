"""Entry point ``cachedit`` of group ``sglang.multimodal_gen.plugins``."""

from __future__ import annotations

import sys

from . import hooks


def register() -> None:
    """Register the hooks. The host calls this once in every process; it must not import the runtime.

    A host whose seams differ is left alone altogether, with one line saying which seam.
    """
    problems = hooks.mismatches(hooks.host_root())
    if problems:
        print(
            "cache-dit: warning: this host is not one the plugin knows, it is left unpatched: "
            + "; ".join(problems),
            file=sys.stderr,
            flush=True,
        )
        return
    from . import startup

    startup.read_settings()
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    hooks.register(HookRegistry, HookType)
