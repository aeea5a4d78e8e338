"""The host's offline engine: one request at a time, with what its workers wrote down."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config.sources import PREFIX
from ..errors import CacheDitError
from ..integration import recording


class EngineError(CacheDitError):
    """The host could not serve a request of the tuner."""


@dataclass(frozen=True)
class Outcome:
    """One served request.

    Args:
        picture: (height, width, 3), or (frames, height, width, 3), uint8.
        latents: the final latents, float32.
        report: the field ``cache_dit``.
        seconds: the whole request.
        tensors: everything recorded, by name.
    """

    picture: np.ndarray
    latents: np.ndarray
    report: Mapping[str, Any]
    seconds: float
    tensors: Mapping[str, np.ndarray]


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class Engine:
    """Starts on the first request; ``close`` ends its workers.

    Args:
        model_path: folder of the model.
        backend: the host's name of the backend, ``sglang`` or ``diffusers``.
        folder: for the workers' recordings.
        server: further server arguments of the host.
    """

    def __init__(self, model_path: str, backend: str, folder: Path, server: Mapping[str, Any]):
        self._arguments = {"model_path": model_path, "backend": backend, **server}
        self._folder = folder
        self._generator: Any = None

    def _start(self) -> Any:
        self._folder.mkdir(parents=True, exist_ok=True)
        os.environ[recording.VARIABLE] = str(self._folder.resolve())
        # What the shell says of caching is for servers; here every request says all of it.
        for name in [name for name in os.environ if name.startswith(PREFIX)]:
            del os.environ[name]
        from sglang.multimodal_gen import DiffGenerator
        from sglang.multimodal_gen.runtime.server_args import ServerArgs

        # Otherwise a host that has nothing to do spins a core; older ones cannot wait.
        waits = {"sleep_on_idle": True} if hasattr(ServerArgs, "sleep_on_idle") else {}
        port, scheduler, master = free_ports(3)
        return DiffGenerator.from_pretrained(
            **{
                "num_gpus": 1, "warmup_mode": "off", "log_level": "error", "port": port,
                "scheduler_port": scheduler, "master_port": master, **waits, **self._arguments,
            }
        )

    def run(self, request: Mapping[str, Any]) -> Outcome:
        """Serve one request with the host's sampling parameters.

        Raises:
            EngineError: the host answered nothing; its own log says why.
        """
        from safetensors.numpy import load_file

        if self._generator is None:
            self._generator = self._start()
        target = self._folder / recording.FILE
        target.unlink(missing_ok=True)
        started = time.perf_counter()
        result = self._generator.generate(
            sampling_params_kwargs={"save_output": False, "return_file_paths_only": False, **request}
        )
        seconds = time.perf_counter() - started
        if result is None or not target.is_file():
            raise EngineError(f"the host could not serve {dict(request)}")
        tensors = load_file(target)
        return Outcome(
            picture=_picture(result.frames), latents=tensors.pop("latents"), report=result.metrics["cache_dit"],
            seconds=seconds, tensors=tensors,
        )

    def close(self) -> None:
        """End the host's processes."""
        if self._generator is not None:
            self._generator.shutdown()
            self._generator = None


def _picture(frames: Any) -> np.ndarray:
    frames = np.asarray(frames)
    return frames[0] if frames.ndim == 4 and len(frames) == 1 else frames
