"""Several hosts side by side, each in a process of its own: the host serves one request at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import SettingError
from .engine import Engine, EngineError, Outcome

MOST = 4
"""Hosts on a CPU where nothing else is asked for; more cores are shared among them."""
PATIENCE_S = 30.0
"""For a host to end."""
Make = Callable[[Path], Engine]


def environments(count: int | None, gpus: int) -> list[dict[str, str]]:
    """Environment variables of each of ``count`` hosts: GPUs of their own, or CPU threads.

    Args:
        count: None for one on accelerators, and one a core, at most ``MOST``, on a CPU: one request of a small model
            gains little from a second thread.
        gpus: of each host.

    Raises:
        SettingError: more GPUs than there are.
    """
    import torch

    if torch.accelerator.is_available():
        count = count or 1
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = named.split(",") if named else [str(number) for number in range(torch.accelerator.device_count())]
        if count == 1:
            return [{}]
        if count * gpus > len(devices):
            allowed = f"expected at most {max(1, len(devices) // gpus)}: {gpus} of {len(devices)} GPUs each"
            raise SettingError("--hosts", count, "command line", allowed)
        return [{"CUDA_VISIBLE_DEVICES": ",".join(devices[n * gpus : (n + 1) * gpus])} for n in range(count)]
    cores = len(os.sched_getaffinity(0))
    count = count or min(MOST, cores)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // count)))
    return [{"OMP_NUM_THREADS": threads} for _ in range(count)]


def _serve(connection: Any, make: Make, folder: Path) -> None:
    """A host's life: requests in, outcomes or errors out, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    engine = make(folder)
    try:
        while True:
            request = connection.recv()
            try:
                answer: Any = engine.run(request)
            except Exception as error:
                answer = EngineError(f"{type(error).__name__}: {error}")
            connection.send(answer)
    except (EOFError, OSError):
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        engine.close()


class Hosts:
    """Engines that start when there is a request for them.

    Args:
        make: an engine that records into the folder that it is given; called in the host's process.
        folder: for their recordings.
        settings: environment variables of each host.
    """

    def __init__(self, make: Make, folder: Path, settings: Sequence[Mapping[str, str]]):
        self._make, self._folder, self._settings = make, folder, list(settings)
        self._pool = ThreadPoolExecutor(len(self._settings))
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._started: list[tuple[Any, Any]] = []
        self._starting = threading.Lock()

    def run_all(self, requests: Sequence[Mapping[str, Any]]) -> Iterator[Outcome]:
        """Outcomes in the order of ``requests``.

        Raises:
            EngineError: a host could not serve one.
        """
        return self._pool.map(self._run, requests)

    def _run(self, request: Mapping[str, Any]) -> Outcome:
        connection = self._connection()
        try:
            connection.send(dict(request))
            answer = connection.recv()
        except (EOFError, OSError) as error:
            raise EngineError("a host has ended; its own log says why") from error
        finally:
            self._idle.put(connection)
        if isinstance(answer, EngineError):
            raise answer
        return answer

    def _connection(self) -> Any:
        """That of an idle host, or of another one that is started."""
        with contextlib.suppress(queue.Empty):
            return self._idle.get_nowait()
        with self._starting:
            if len(self._started) < len(self._settings):
                return self._start(self._settings[len(self._started)])
        return self._idle.get()

    def _start(self, variables: Mapping[str, str]) -> Any:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        folder = self._folder / str(len(self._started))
        process = context.Process(target=_serve, args=(theirs, self._make, folder))
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        theirs.close()
        self._started.append((process, ours))
        return ours

    def close(self) -> None:
        """End the hosts, whatever they are doing."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process, _ in self._started:
            process.terminate()
        for process, connection in self._started:
            process.join(PATIENCE_S)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()
        self._started.clear()
