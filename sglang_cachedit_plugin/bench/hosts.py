"""Host processes of a comparison, and a running server in their place: both answer ``run`` with a reply."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from .variants import PLUGIN, STOCK, Variant

_GROUP, _NAME = "sglang.multimodal_gen.plugins", "cachedit"
_PREFIX = "SGLANG_CACHE_DIT_"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_EXCEPTION = re.compile(r"[A-Za-z_.]+(Error|Exception|Interrupt)\b")


class HostError(Exception):
    """A host process that did not start or ended; the message is the reason."""


def free_ports(count: int) -> list[int]:
    """Ports that nothing on this machine uses now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def plugins_without_this() -> str:
    """The host's list of allowed plugins (``SGLANG_PLUGINS``) that leaves this plugin out and keeps all others."""
    given = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    installed = [point.name for group in (_GROUP, "sglang.multimodal_gen.platforms")
                 for point in metadata.entry_points(group=group)]
    kept = [name for name in (given or installed) if name != _NAME]
    return ",".join(dict.fromkeys(kept)) or "none"


def environment(variant: Variant, logs: Path, *, sync: bool) -> dict[str, str]:
    """The environment of a variant's host: the caller's without any cache settings, then the variant's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_PREFIX)}
    kept |= {
        "SGLANG_DIFFUSION_STAGE_LOGGING": "1", "SGLANG_PERF_LOG_DIR": str(logs),
        "SGLANG_DIFFUSION_SYNC_STAGE_PROFILING": "1" if sync else "0",
    }
    if variant.kind != PLUGIN:
        kept["SGLANG_PLUGINS"] = plugins_without_this()
    return kept | variant.environment()


def arguments(
    variant: Variant, model_path: str, backend: str, num_gpus: int, host_flags: Sequence[str], config: str | None,
    folder: Path,
) -> list[str]:
    """Host flags of a variant's process; given ones outrank those set here."""
    port, scheduler, master = free_ports(3)
    flags = {
        "--model-path": model_path, "--backend": backend, "--num-gpus": str(num_gpus), "--warmup-mode": "off",
        "--log-level": "error", "--port": str(port), "--scheduler-port": str(scheduler), "--master-port": str(master),
    }
    given = {flag.split("=")[0].replace("_", "-") for flag in host_flags if flag.startswith("--")}
    if variant.kind == PLUGIN and config:
        flags["--cache-dit-config"] = config
    if variant.kind == STOCK and backend == "diffusers":
        path = folder / f"{variant.name}.yaml"
        path.write_text(yaml.safe_dump(_plain(variant.stock_file())), encoding="utf-8")
        flags["--cache-dit-config"] = str(path)
    return [*(text for flag, value in flags.items() if flag not in given for text in (flag, value)), *host_flags]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


class HostProcess:
    """The real host in a process of its own, with one variant's environment.

    Args:
        log: file for the host's output.
        timeout: seconds that a start or a request may take.

    Raises:
        HostError: it did not start.
    """

    WORKER = (sys.executable, "-m", f"{__package__}.worker")

    def __init__(self, host_arguments: Sequence[str], env: Mapping[str, str], log: Path, timeout: float):
        self.log, self.timeout, self._patience = log, timeout, 30.0
        self._replies, theirs = os.pipe()
        self._pending = b""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*self.WORKER, str(theirs)],
                stdin=subprocess.PIPE, stdout=out, stderr=out, env=dict(env), pass_fds=(theirs,),
                start_new_session=True, text=True,
            )
        os.close(theirs)
        try:
            started = self._ask({"arguments": list(host_arguments)})
        except BaseException:
            self.close()
            raise
        if started["error"]:
            self.close()
            raise HostError(started["error"])
        self.start_s: float | None = started["start_s"]

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
        try:
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise HostError(self._why()) from None
        deadline = time.monotonic() + self.timeout
        while b"\n" not in self._pending:
            readable, _, _ = select.select([self._replies], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                self._patience = 0.0
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
        """End the host and everything it started."""
        if self.process.stdin is not None and self.process.poll() is None:
            try:
                self.process.stdin.close()
                self.process.wait(timeout=self._patience)
            except (OSError, subprocess.TimeoutExpired):
                pass
        for end in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, end)
                time.sleep(0.2)
            except ProcessLookupError:
                break
        self.process.wait()
        if self._replies >= 0:
            os.close(self._replies)
            self._replies = -1
