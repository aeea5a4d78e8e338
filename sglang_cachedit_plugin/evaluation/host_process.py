"""The real host in processes of its own, for whoever measures: one, or several side by side."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config.sources import PREFIX
from ..errors import CacheDitError, SettingError
from ..integration import recording

MOST = 4
"""Hosts on a CPU where nothing else is asked for; more cores are shared among them."""
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_EXCEPTION = re.compile(r"[A-Za-z_.]+(Error|Exception|Interrupt)\b")


class HostError(CacheDitError):
    """A host process that did not start, ended, or could not serve a request; the message is the reason."""


def free_ports() -> dict[str, int]:
    """Ports for one host that nothing on this machine uses now, by server argument."""
    with contextlib.ExitStack() as stack:
        found = {}
        for name in ("port", "scheduler_port", "master_port"):
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            found[name] = probe.getsockname()[1]
        return found


def without_settings() -> dict[str, str]:
    """The caller's environment without cache settings: every request says all of them."""
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}


class HostProcess:
    """The real host in a process of its own; ``start`` waits until it serves.

    Args:
        log: file for the host's output.
        timeout: seconds that a start or a request may take; None for no limit.
    """

    WORKER = (sys.executable, "-m", f"{__package__}.worker")

    def __init__(self, env: Mapping[str, str], log: Path, timeout: float | None):
        self.log, self.timeout = log, timeout
        self.start_s: float | None = None
        self._replies, theirs = os.pipe()
        self._pending = b""
        self._asking = threading.Lock()
        self._gave_up = False
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            # A session of its own: Ctrl-C is for the parent, and everything that the host starts is ended with it.
            self.process = subprocess.Popen(
                [*self.WORKER, str(theirs)],
                stdin=subprocess.PIPE, stdout=out, stderr=out, env=dict(env), pass_fds=(theirs,),
                start_new_session=True, text=True,
            )
        os.close(theirs)

    def start(self, server: Mapping[str, Any] | Sequence[str]) -> HostProcess:
        """Wait for the host.

        Args:
            server: server arguments by name, or a list of the host's flags.

        Raises:
            HostError: it did not start.
        """
        try:
            started = self._ask({"server": server})
            if started["error"]:
                raise HostError(started["error"])
        except BaseException:
            self.close()
            raise
        self.start_s = started["start_s"]
        return self

    def run(self, request: Mapping[str, Any], picture: Path | None = None) -> dict[str, Any]:
        """One request's reply, see worker.py.

        Raises:
            HostError: the process ended or took too long.
        """
        written = self.log.stat().st_size
        reply = self._ask({"request": dict(request), "picture": None if picture is None else str(picture)})
        if reply["error"] and (cause := self._cause(written)):
            reply["error"] = f"{reply['error'].strip().rstrip(':')}: {cause}"
        return reply

    def _cause(self, since: int) -> str | None:
        """The last exception in the host's log: an assertion without a message leaves nothing in the reply."""
        new = self.log.read_bytes()[since:].decode(errors="replace")
        lines = [_ANSI.sub("", line) for line in new.splitlines()]
        found = [line for line in lines if _EXCEPTION.match(line) and not line.startswith("Exception:")]
        return found[-1][:300] if found else None

    def _ask(self, what: Mapping[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        with self._asking:
            try:
                self.process.stdin.write(json.dumps(what) + "\n")
                self.process.stdin.flush()
            except (OSError, ValueError):
                raise HostError(self._why()) from None
            deadline = None if self.timeout is None else time.monotonic() + self.timeout
            while b"\n" not in self._pending:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not select.select([self._replies], [], [], left)[0]:
                    self._gave_up = True
                    raise HostError(f"no answer within {self.timeout:g} s")
                part = os.read(self._replies, 1 << 16)
                if not part:
                    raise HostError(self._why())
                self._pending += part
            line, _, self._pending = self._pending.partition(b"\n")
        return json.loads(line)

    def _why(self) -> str:
        status = self.process.wait(timeout=60)
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"the host left with status {status}: {lines[-1][:300] if lines else 'no output'}"

    def close(self) -> None:
        """End the host and everything it started; a host that is serving a request is not waited for."""
        if self.process.poll() is None and not self._gave_up and not self._asking.locked():
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self.process.stdin.close()
                self.process.wait(timeout=30.0)
        for end in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, end)
                time.sleep(0.2)
            except ProcessLookupError:
                break
        self.process.wait()
        with self._asking:
            if self._replies >= 0:
                os.close(self._replies)
                self._replies = -1


@dataclass(frozen=True)
class Outcome:
    """One request that a pool served.

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


class HostPool:
    """Hosts that record what their requests went through; each starts when there is a request for it.

    Args:
        server: server arguments by name.
        folder: for recordings, pictures and logs.
        settings: environment variables of each host.
    """

    def __init__(self, server: Mapping[str, Any], folder: Path, settings: Sequence[Mapping[str, str]]):
        self._server, self._folder, self._settings = server, folder, list(settings)
        self._pool = ThreadPoolExecutor(len(self._settings))
        self._idle: queue.SimpleQueue[HostProcess | None] = queue.SimpleQueue()
        self._unused = list(range(len(self._settings)))
        self._hosts: list[HostProcess] = []

    def run_all(self, requests: Sequence[Mapping[str, Any]]) -> Iterator[Outcome]:
        """Outcomes in the order of ``requests``.

        Raises:
            HostError: a host could not serve one.
        """
        return self._pool.map(self._run, requests)

    def _run(self, request: Mapping[str, Any]) -> Outcome:
        from safetensors.numpy import load_file

        host = self._host()
        try:
            picture, recorded = (host.log.with_name(name) for name in ("picture.npy", recording.FILE))
            recorded.unlink(missing_ok=True)
            reply = host.run(request, picture)
            if reply["error"] or not recorded.is_file():
                raise HostError(f"the host could not serve {dict(request)}: {reply['error'] or 'nothing was recorded'}")
            tensors = load_file(recorded)
            return Outcome(
                picture=np.load(picture, allow_pickle=False), latents=tensors.pop("latents"),
                report=reply["metrics"]["cache_dit"], seconds=reply["seconds"], tensors=tensors,
            )
        finally:
            self._idle.put(host)

    def _host(self) -> HostProcess:
        """An idle host, or another one that is started."""
        with contextlib.suppress(queue.Empty):
            return self._given(self._idle.get_nowait())
        try:
            number = self._unused.pop(0)
        except IndexError:
            return self._given(self._idle.get())
        folder = (self._folder / str(number)).resolve()
        env = {**without_settings(), **self._settings[number], recording.VARIABLE: str(folder)}
        host = HostProcess(env, folder / "host.log", None)
        self._hosts.append(host)
        try:
            return host.start(
                {"num_gpus": 1, "warmup_mode": "off", "log_level": "error", **free_ports(), **self._server}
            )
        except BaseException:
            self._idle.put(None)
            raise

    def _given(self, host: HostProcess | None) -> HostProcess:
        if host is None:
            self._idle.put(None)
            raise HostError("a host did not start, or all are ended")
        return host

    def close(self) -> None:
        """End the hosts, whatever they are doing."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._idle.put(None)
        self._unused.clear()
        with ThreadPoolExecutor(len(self._settings)) as ending:
            list(ending.map(HostProcess.close, self._hosts))
        self._pool.shutdown()
