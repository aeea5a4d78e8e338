"""Entry point ``cachedit`` of group ``sglang.multimodal_gen.plugins``."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from types import TracebackType

from . import hooks
from .errors import CacheDitError
from .integration import host_contract, sglang_api, startup


def register() -> None:
    """Register the hooks. The host calls this once in every process; it must not import the runtime.

    A host whose hook points differ is left alone altogether, with one line saying which hook point.
    """
    problems, unknown = hooks.mismatches(hooks.host_root()), "; ".join(host_contract.untried())
    if problems:
        startup.warn("this host is not one the plugin knows, it is left unpatched: " + "; ".join(problems))
        return
    if unknown and multiprocessing.parent_process() is None:
        # Workers are spawned: once is enough.
        startup.warn(f"{unknown}; all that the plugin needs is there, so it works")
    startup.read_settings()
    hooks.register(*sglang_api.hook_registry())
    if Path(sys.argv[0]).name == "sglang" and sys.excepthook is sys.__excepthook__:
        sys.excepthook = _one_line


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A refusal that ends the host's command line is one line; every other error keeps its traceback."""
    if isinstance(error, CacheDitError):
        print(f"cache-dit: error: {error}", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)
