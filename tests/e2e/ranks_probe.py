"""Runs requests through the real host's workers, several ranks at once, and writes down what each saw.

``python -m tests.e2e.ranks_probe JOBS.json OUT.pt``; a job is ``{"name", "ranks", "server": {server arguments},
"requests": [{sampling parameters}]}``. The host is imported once; every rank of every job is forked from there.
OUT holds results by job, rank and request. A request with ``"fail": [rank, step]`` has one block raise there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from tests.e2e.probe import BLOCK_LISTS, count_blocks, record_latents, run_request, transformers

LIMIT = 400
"""Seconds that a job may take."""


def run_rank(job: dict[str, Any], rank: int) -> list[dict[str, Any]]:
    """Results of one rank, in order of the requests."""
    from sglang.multimodal_gen.runtime.managers.gpu_worker import GPUWorker
    from sglang.multimodal_gen.runtime.server_args import ServerArgs, set_global_server_args

    args = ServerArgs.from_kwargs(
        num_gpus=job["ranks"], warmup_mode="off", attention_backend="torch_sdpa", **job["server"]
    )
    set_global_server_args(args)
    worker = GPUWorker(local_rank=rank, rank=rank, master_port=job["server"]["master_port"], server_args=args)
    calls, latents = count_blocks(worker), record_latents(worker)
    results = []
    for request in job["requests"]:
        failing, step = request.pop("fail", (None, None))
        hook = _fail_at(worker, step) if failing == rank else None
        results.append(run_request(worker, args, request, calls, latents))
        if hook is not None:
            hook.remove()
    return results


def _fail_at(worker: Any, step: int) -> Any:
    from sglang_cachedit_plugin.integration import sglang_api

    def fail(*args: Any) -> None:
        if sglang_api.forward_context().current_timestep == step:
            raise RuntimeError("this block fails")

    # The first block runs on cached steps too.
    transformer = transformers(worker)["transformer"]
    blocks = next(getattr(transformer, name) for name in BLOCK_LISTS if hasattr(transformer, name))
    return blocks[0].register_forward_pre_hook(fail)


def run_job(job: dict[str, Any], out: Path) -> list[list[dict[str, Any]]]:
    """Results by rank."""
    children = {}
    for rank in range(job["ranks"]):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                torch.save(run_rank(job, rank), f"{out}.{rank}")
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children[child] = rank
    _wait(set(children), job["name"])
    return [torch.load(f"{out}.{rank}") for rank in range(job["ranks"])]


def _wait(left: set[int], name: str) -> None:
    deadline, failed = time.monotonic() + LIMIT, ""
    while left and not failed:
        child, status = os.waitpid(-1, os.WNOHANG)
        left.discard(child)
        if status:
            failed = f"{name}: a rank left with {status}"
        elif time.monotonic() > deadline:
            failed = f"{name}: not done in {LIMIT} s"
        elif not child:
            time.sleep(0.05)
    for each in left:
        os.kill(each, signal.SIGKILL)
        os.waitpid(each, 0)
    if failed:
        sys.exit(failed)


def main() -> None:
    """Command line."""
    from sglang.multimodal_gen.runtime.platforms import initialize_current_platform
    from sglang.multimodal_gen.runtime.platforms.plugins import apply_plugin_hooks

    initialize_current_platform()
    apply_plugin_hooks()
    import sglang.multimodal_gen.runtime.managers.gpu_worker  # noqa: F401  (before the forks, once)

    from tests.tiny import cpu_ops

    cpu_ops.register()
    with open(sys.argv[1]) as source:
        jobs = json.load(source)
    out = Path(sys.argv[2])
    results = {}
    for job in jobs:
        started = time.monotonic()
        results[job["name"]] = run_job(job, out)
        print(f"{job['name']}: {time.monotonic() - started:.0f} s", flush=True)
    torch.save(results, out)


if __name__ == "__main__":
    main()
