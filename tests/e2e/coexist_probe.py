"""The real host with another plugin, or without this one: ``python -m tests.e2e.coexist_probe IN.json OUT.pt``.

IN holds situations by name: ``{"path": folders put before all others in sys.path, "environment": {...}, "jobs": as for
probe.py}``. Each runs in a process of its own, forked after the host is imported and before any plugin is; the host
hooks what is imported already. OUT holds for each: the results of its jobs, who registered hooks in which order, which
of the host's functions were patched, and what the neighbour's hooks and ours did.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys
import tempfile
from typing import Any

import torch

from tests.e2e import probe

OURS = "sglang_cachedit_plugin"


def run_situation(situation: dict[str, Any]) -> dict[str, Any]:
    """Everything of one situation."""
    sys.path[:0] = situation["path"]
    os.environ |= situation["environment"]
    found: dict[str, Any] = {"jobs": probe.run_jobs(situation["jobs"])}
    # The probe itself keeps no module of the plugin.
    found["imported"] = OURS in sys.modules
    found |= registered()
    found |= entrances()
    neighbour = sys.modules.get("tests.e2e.neighbour")
    found["neighbour"] = dict(neighbour.calls) if neighbour else None
    return found


def registered() -> dict[str, Any]:
    """Names of plugins by target in order of registration; hooks that are out of place; patched functions."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry

    order = {
        target: [source.plugin_name for _, _, source in hooks] for target, hooks in HookRegistry._hooks.items()
    }
    loaded = OURS in sys.modules
    from sglang_cachedit_plugin import hooks

    # The host's registry puts wrappers of its own into the place of what is hooked.
    patched = {}
    for point in hooks.HOOK_POINTS:
        place, _, name = point.target.rpartition(".")
        function = getattr(pkgutil.resolve_name(place), name)
        patched[point.target] = function.__code__.co_filename.endswith("hook_registry.py")
    return {"order": order, "patched": patched, "out_of_place": hooks.out_of_place(HookRegistry) if loaded else []}


def entrances() -> dict[str, Any]:
    """What both plugins add to metrics and addresses, and what becomes of a bad setting."""
    from fastapi import HTTPException
    from sglang.multimodal_gen.runtime.entrypoints import http_server
    from sglang.multimodal_gen.runtime.entrypoints.openai import utils
    from sglang.multimodal_gen.runtime.server_args import get_global_server_args
    from sglang.multimodal_gen.runtime.utils.perf_logger import RequestMetrics

    metrics = RequestMetrics("id")
    metrics.cache_dit = {"enabled": False}
    app = http_server.create_app(get_global_server_args())
    try:
        utils.build_sampling_params("id", prompt="a", cache_dit_params={"max_warmup_stepz": 1})
        refused = None
    except HTTPException as error:
        refused = error.detail
    except Exception as error:
        refused = type(error).__name__
    return {"metrics": metrics.to_dict(), "addresses": sorted(app.openapi()["paths"]), "refused": refused}


def forked(situation: dict[str, Any]) -> dict[str, Any]:
    """The same in a child process."""
    with tempfile.NamedTemporaryFile() as file:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                torch.save(run_situation(situation), file.name)
                status = 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        assert status == 0, f"the child left with {status}"
        return torch.load(file.name)


def main() -> None:
    """Command line."""
    torch.set_num_threads(1)
    with open(sys.argv[1]) as source:
        asked = json.load(source)
    # The slow imports are made once.
    from sglang.multimodal_gen.runtime.platforms import initialize_current_platform

    initialize_current_platform()
    for name in ("managers.gpu_worker", "entrypoints.http_server", "disaggregation.orchestrator"):
        importlib.import_module(f"sglang.multimodal_gen.runtime.{name}")
    assert OURS not in sys.modules
    torch.save({name: forked(each) for name, each in asked.items()}, sys.argv[2])


if __name__ == "__main__":
    main()
