"""Faults inside a real worker, asked for by a file; a made-up distribution gives it to the host's processes.

``FAULTS`` names a folder. ``fault.json`` there holds ``{"place", "call", "kind"}``: the ``call``-th visit of ``place``
from then on fails in the way of ``kind``, once. After each request the worker writes to ``level.json`` how many tensors
are alive and what they hold.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import time
from pathlib import Path
from typing import Any

FOLDER = "FAULTS"
HANG_S = 2.0


def fail(kind: str, value: Any) -> Any:
    """Do what ``kind`` says in place of returning ``value``."""
    import torch

    if kind == "error":
        raise RuntimeError("injected: a fault of the machine")
    if kind == "memory":
        raise torch.OutOfMemoryError("injected: CUDA out of memory")
    if kind == "nan":
        return _map(lambda each: torch.full_like(each, torch.nan), value)
    time.sleep(float(kind))
    return value


def _map(change, value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return change(value)
    return type(value)(_map(change, each) for each in value) if isinstance(value, tuple | list) else value


class Faults:
    """What was asked for, and how often its place was visited since."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._asked: tuple[float, dict[str, Any]] | None = None
        self._visits = 0

    def visit(self, place: str, value: Any = None) -> Any:
        """``value``, unless this visit is the one that fails."""
        asked = self._read()
        if asked is None or asked["place"] != place:
            return value
        self._visits += 1
        if self._visits <= asked["call"]:
            return value
        (self.folder / "fault.json").unlink()
        return fail(asked["kind"], value)

    def _read(self) -> dict[str, Any] | None:
        file = self.folder / "fault.json"
        try:
            written = file.stat().st_mtime_ns
            if self._asked is None or self._asked[0] != written:
                self._asked, self._visits = (written, json.loads(file.read_text())), 0
        except FileNotFoundError:
            return None
        return self._asked[1]

    def level(self) -> None:
        """Write down which tensors are alive."""
        import torch

        gc.collect()
        alive = [each for each in gc.get_objects() if type(each) is torch.Tensor]
        size = sum(each.numel() * each.element_size() for each in alive)
        (self.folder / "level.new").write_text(json.dumps({"tensors": len(alive), "bytes": size, "pid": os.getpid()}))
        (self.folder / "level.new").replace(self.folder / "level.json")


def wrapped(faults: Faults, place: str, own: Any) -> Any:
    """``own``, with a visit of ``place`` after each call."""

    @functools.wraps(own)
    def call(*args: Any, **kwargs: Any) -> Any:
        return faults.visit(place, own(*args, **kwargs))

    return call


def prepare(result: Any, worker: Any, *args: Any, **kwargs: Any) -> None:
    """After the worker has loaded its model: make the places."""
    from sglang_cachedit_plugin.cache import branch_cache, forecast, similarity

    faults = worker.faults = Faults(Path(os.environ[FOLDER]))
    pipe = getattr(worker.pipeline, "diffusers_pipe", None)
    transformer, vae = (
        (pipe.transformer, pipe.vae) if pipe is not None else map(worker.pipeline.modules.get, ("transformer", "vae"))
    )
    transformer.transformer_blocks[0].register_forward_hook(lambda block, args, output: faults.visit("block", output))
    vae.decode = wrapped(faults, "vae", vae.decode)
    branch_cache.residual_difference = wrapped(faults, "similarity", branch_cache.residual_difference)
    forecast.Extrapolator.predict = wrapped(faults, "forecast", forecast.Extrapolator.predict)
    # On a CPU the kernel's place is where it would be asked for.
    similarity.usable = wrapped(faults, "kernel", similarity.usable)
    # What is alive now stays; only what comes later is looked through after each request.
    gc.collect()
    gc.freeze()


def finished(result: Any, worker: Any, *args: Any, **kwargs: Any) -> Any:
    """After a request, whatever came of it."""
    worker.faults.level()
    return result


def register() -> None:
    """Entry point in the host's group of plugins."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    where = "sglang.multimodal_gen.runtime.managers.gpu_worker.GPUWorker"
    HookRegistry.register(f"{where}.init_device_and_model", prepare, HookType.AFTER)
    HookRegistry.register(f"{where}.execute_forward", finished, HookType.AFTER)
