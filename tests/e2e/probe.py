"""Runs requests through the real host in this process and writes down what came out.

``python -m tests.e2e.probe JOB.json OUT.pt`` where JOB is a list of
``{"name", "server": {server arguments}, "requests": [{sampling parameters}]}``. For each request OUT holds
the final latents, the report, how often each block of each block list ran, and how many graphs the compiler has made
so far. A job with ``"fresh": true`` runs every request as the first of a process of its own, forked after loading.
``{"call": METHOD, ...}`` among the requests calls a method of the worker with the rest, ``"warmup": STEPS`` makes the
host's warmup request of one. Of a job, ``"compile_backend"`` is what torch.compile uses, ``"environment"`` holds while
it runs, ``"device_with_streams"`` says what its name does, and ``"bare"`` jobs run first, before the hooks of any
plugin are in place: the host as it is.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from tests.tiny.streams import device_with_streams

BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")


def run_jobs(jobs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Each job's model is loaded by the host's own worker; results by job name."""
    from sglang.multimodal_gen.runtime.platforms import initialize_current_platform
    from sglang.multimodal_gen.runtime.platforms.plugins import apply_plugin_hooks

    initialize_current_platform()
    from tests.tiny import cpu_ops

    cpu_ops.register()
    bare = {job["name"]: run_job(job) for job in jobs if job.get("bare")}
    apply_plugin_hooks()
    return bare | {job["name"]: run_job(job) for job in jobs if not job.get("bare")}


def run_job(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Results of one model's requests, in order."""
    with ExitStack() as scope:
        scope.enter_context(mock.patch.dict(os.environ, job.get("environment", {})))
        if backend := job.get("compile_backend"):
            scope.enter_context(compiling_with(backend))
        if job.get("device_with_streams"):
            scope.enter_context(device_with_streams())
        return run_requests(job)


@contextmanager
def compiling_with(backend: str) -> Iterator[None]:
    """Whatever the host asks of torch.compile is done by ``backend``; its counters start at nothing."""
    own = torch.compile
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def compiled(*given, mode=None, **options):
        return own(*given, **options | {"backend": backend})

    with mock.patch.object(torch, "compile", compiled):
        yield


def run_requests(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Loads the job's model and runs its requests."""
    from sglang.multimodal_gen.runtime.managers.gpu_worker import GPUWorker
    from sglang.multimodal_gen.runtime.server_args import ServerArgs, set_global_server_args

    server = {"warmup_mode": "off", "attention_backend": "torch_sdpa"} | job["server"]
    args = ServerArgs.from_kwargs(num_gpus=1, **server)
    set_global_server_args(args)
    worker = GPUWorker(local_rank=0, rank=0, master_port=job["server"]["master_port"], server_args=args)
    calls = count_blocks(worker)
    latents = record_latents(worker)
    run = run_forked if job.get("fresh") else run_request
    return [run(worker, args, request, calls, latents) for request in job["requests"]]


def run_forked(worker, args, request, calls, latents) -> dict[str, Any]:
    """One request in a child process that served nothing before."""
    with tempfile.NamedTemporaryFile() as file:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                torch.save(run_request(worker, args, request, calls, latents), file.name)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        assert status == 0, f"the child left with {status}"
        return torch.load(file.name)


def run_request(worker, args, request, calls, latents) -> dict[str, Any]:
    """One request's outcome."""
    from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
    from sglang.multimodal_gen.runtime.entrypoints.utils import prepare_request

    calls.clear()
    latents.clear()
    request = dict(request)
    if "call" in request:
        answer = getattr(worker, request.pop("call"))(**request)
        return {"error": answer.error}
    warmup = request.pop("warmup", 0)
    params = SamplingParams.from_user_sampling_params_args(
        args.model_path, server_args=args, save_output=False, return_file_paths_only=False, **request
    )
    prepared = prepare_request(args, params)
    output = worker.execute_forward([prepared.copy_as_warmup(warmup) if warmup else prepared])
    report = getattr(output.metrics, "cache_dit", None)
    return {
        "latents": latents[-1] if latents else None,
        "report": report,
        "calls": dict(calls),
        "error": output.error,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


def transformers(worker) -> dict[str, torch.nn.Module]:
    """The worker's diffusion transformers by name."""
    pipe = getattr(worker.pipeline, "diffusers_pipe", None)
    found = {}
    for name in ("transformer", "transformer_2"):
        module = getattr(pipe, name, None) if pipe is not None else worker.pipeline.modules.get(name)
        if module is not None:
            found[name] = module
    return found


def count_blocks(worker) -> Counter:
    """Counts calls as (transformer, list, index)."""
    calls: Counter = Counter()
    for name, module in transformers(worker).items():
        for attribute in BLOCK_LISTS:
            for index, block in enumerate(getattr(module, attribute, ())):
                key = f"{name}.{attribute}.{index}"
                block.register_forward_pre_hook(lambda *_, key=key: calls.update([key]))
    return calls


def record_latents(worker) -> list[torch.Tensor]:
    """Every sample that the scheduler of either backend returns, latest last."""
    seen: list[torch.Tensor] = []
    pipe = getattr(worker.pipeline, "diffusers_pipe", None)
    scheduler = pipe.scheduler if pipe is not None else worker.pipeline.modules["scheduler"]
    own = type(scheduler).step

    def step(self, *args, **kwargs):
        result = own(self, *args, **kwargs)
        sample = result[0] if isinstance(result, tuple) else result.prev_sample
        seen[:] = [sample.detach().clone()]
        return result

    step.__wrapped__ = own
    type(scheduler).step = step
    return seen


def main() -> None:
    """Command line."""
    torch.set_num_threads(1)
    with open(sys.argv[1]) as source:
        jobs = json.load(source)
    torch.save(run_jobs(jobs), sys.argv[2])


if __name__ == "__main__":
    main()
