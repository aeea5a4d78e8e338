"""Processes of the host, forked after its slow imports.

A start of the host imports torch, transformers and SGLang for 14 s, in the launcher and in each worker. Here one
process of each session of tests has imported them (``preloaded.py``) and forks what the tests start. A fork runs the
same script or module, in a session, a folder and an environment of its own. The workers that it spawns are forked from
a copy of it that was made before it ran anything. What an import reads from the environment is what
``host_environment`` has. Processes that show that the real command line works are ``cold``, started in the ordinary
way.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import importlib
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import connection, context, forkserver, process, reduction, spawn
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_lock = threading.Lock()
"""Several threads start and ask for processes, which the standard library's bookkeeping does not bear."""


def host_environment(**extra: str) -> dict[str, str]:
    """The environment of a host process: no hub, one thread, nothing of the caller's cache settings."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SGLANG_")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path} | extra


class Forked:
    """A process in a session of its own, as far as needed like ``subprocess.Popen``.

    Args:
        command: a script of the environment (``sglang``, ``sglang-cachedit``) or ``-m`` and a module, then arguments.
        out: file for its output, ``err`` for that of errors if it is to be apart.
    """

    def __init__(
        self, command: Sequence[object], *, cwd: Path, env: Mapping[str, str], out: Path, err: Path | None = None
    ):
        files = [str(out), str(err or out)]
        self.args = [str(part) for part in command]
        forks = multiprocessing.get_context("forkserver")
        self._process = forks.Process(target=_run, args=(self.args, str(cwd), dict(env), files))
        with _lock:
            forks.set_forkserver_preload(["tests.preloaded"])
            self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, None while it runs."""
        with _lock:
            return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Exit status once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.returncode) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.02)
        return status

    def send_signal(self, number: int) -> None:
        """To this process alone."""
        os.kill(self.pid, number)


def start(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], out: Path, cold: bool = False
) -> Forked | subprocess.Popen:
    """A process that writes to ``out``; a ``cold`` one is no fork."""
    if not cold:
        return Forked(command, cwd=cwd, env=env, out=out)
    with out.open("w") as file:
        return subprocess.Popen(
            _ordinary(command), cwd=cwd, env=dict(env), stdout=file, stderr=file, start_new_session=True
        )


def end(process: Forked | subprocess.Popen) -> None:
    """End a process and all that it started, gently first; nothing happens if it has ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
    process.wait()


def _ordinary(command: Sequence[object]) -> list[str]:
    """A command as the operating system takes it."""
    first, *rest = map(str, command)
    return [sys.executable, first, *rest] if first == "-m" else [str(Path(sys.executable).with_name(first)), *rest]


def run(
    command: Sequence[object], *, cwd: Path = ROOT, env: Mapping[str, str], timeout: float, cold: bool = False
) -> subprocess.CompletedProcess[str]:
    """What came of a command, as from ``subprocess.run(capture_output=True)``; of a ``cold`` one, it is from there."""
    if cold:
        return subprocess.run(
            _ordinary(command), cwd=cwd, env=dict(env), capture_output=True, text=True, timeout=timeout,
            errors="replace",
        )
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        made = Forked(command, cwd=cwd, env=env, out=files[0], err=files[1])
        try:
            status = made.wait(timeout)
        finally:
            end(made)
        said = [file.read_text(errors="replace") for file in files]
    return subprocess.CompletedProcess(made.args, status, *said)


def _run(command: list[str], cwd: str, environment: dict[str, str], files: list[str]) -> None:
    """In the fork: become the command, in a session of its own."""
    os.setsid()
    for number, file in enumerate(files, 1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    _become(command, cwd, environment)


def _become(command: list[str], cwd: str, environment: dict[str, str]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    installed = [each for each in sys.path if each.startswith((sys.prefix, sys.base_prefix, "__editable__"))]
    given = environment["PYTHONPATH"].split(os.pathsep)
    sys.path[:] = [*([cwd] if command[0] == "-m" else []), *given, *installed]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    # Whoever asks is told that nobody forked this process.
    process._parent_process, process.current_process().name = None, "MainProcess"
    random.seed()
    if "TORCH_LOGS" in environment:
        # torch has read it when it was imported.
        sys.modules["torch._logging"]._init_logs()
    forks = _fork_instead_of_spawning()
    subprocess.Popen = _Popen
    try:
        if command[0] == "-m":
            sys.argv[:] = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            script = Path(sys.executable).with_name(command[0])
            sys.argv[:] = [str(script), *command[1:]]
            runpy.run_path(str(script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()
        os.kill(forks, signal.SIGKILL)
        os.waitpid(forks, 0)


def _fork_instead_of_spawning() -> int:
    """From now on a worker that this process spawns is forked from what it is now; the process that keeps that."""
    ready, prepare, main = spawn.get_preparation_data, spawn.prepare, spawn._main

    def prepared(name: str) -> dict:
        return ready(name) | {"environment": dict(os.environ)}

    def taken(data: dict) -> None:
        os.environ.clear()
        os.environ.update(data["environment"])
        prepare(data)

    def run_to_the_end(*arguments: int) -> int:
        try:
            return main(*arguments)
        finally:
            atexit._run_exitfuncs()

    spawn.get_preparation_data, spawn.prepare, spawn._main = prepared, taken, run_to_the_end
    context._concrete_contexts["spawn"] = context._concrete_contexts["forkserver"]
    address = connection.arbitrary_address("AF_UNIX")
    alive, keeps_alive = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        child = os.fork()
        if child == 0:
            os.close(keeps_alive)
            # Workers ask for the same, and this is their parent.
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            try:
                forkserver.main(listener.detach(), alive, [])
            finally:
                os._exit(0)
    os.close(alive)
    made = forkserver._forkserver
    made._forkserver_address, made._forkserver_alive_fd, made._forkserver_pid = address, keeps_alive, child
    return child


class _Inherited:
    """A descriptor that arrives as one in the process that it is sent to."""

    def __init__(self, number: int):
        self._number = number

    def __reduce__(self) -> tuple:
        return _arrived, (reduction.DupFd(self._number),)


def _arrived(sent: Any) -> int:
    # Higher than any that it may have to become.
    return fcntl.fcntl(sent.detach(), fcntl.F_DUPFD, 200)


class _Popen(subprocess.Popen):
    """Forks what a command starts as ``python -m MODULE``; the rest is started in the ordinary way."""

    _forked: Any = None

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
        start_new_session, process_group,
    ) -> None:
        if shell or list(args)[:2] != [sys.executable, "-m"]:
            super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
                start_new_session, process_group,
            )
            return
        given = dict(enumerate((p2cread, c2pwrite, errwrite))) | {number: number for number in pass_fds}
        # What travels belongs to the module that whoever unpickles it finds.
        here = importlib.import_module(__name__)
        inherited = {number: here._Inherited(own) for number, own in given.items() if own != -1}
        command, environment = [str(part) for part in args[1:]], dict(os.environ if env is None else env)
        self._forked = multiprocessing.get_context("forkserver").Process(
            target=here._spawned, args=(command, str(cwd or os.getcwd()), environment, inherited, start_new_session)
        )
        self._forked.start()
        self.pid, self._child_created = self._forked.pid, True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _internal_poll(self, *rest: Any, **more: Any) -> int | None:
        if self._forked is None:
            return super()._internal_poll(*rest, **more)
        self.returncode = self._forked.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._forked is None:
            return super()._wait(timeout)
        self._forked.join(timeout)
        if self._internal_poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode


def _spawned(command: list[str], cwd: str, environment: dict[str, str], files: dict[int, int], session: bool) -> None:
    if session:
        os.setsid()
    for number, file in files.items():
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(0, closefd=False)
    _become(command, cwd, environment)
