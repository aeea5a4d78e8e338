"""One host process of ``host_process``: ``python -m sglang_cachedit_plugin.evaluation.worker REPLIES``.

Reads one JSON object a line from stdin: first ``{"server": [host flags] or {server arguments}}``, then requests
``{"request": {sampling parameters}, "picture": path or null}``. REPLIES is the number of an open file that takes
one JSON object for each: ``{"start_s"}``, then ``{"seconds", "metrics", "peak_memory_mb", "peak_rss_mb", "error"}``.
The host's own output goes to stdout and stderr.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


class LastError(logging.Handler):
    """Remembers the host's last error: its offline engine logs failures and returns nothing."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.text: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the exception's text, or the message."""
        cause = record.exc_info[1] if record.exc_info else None
        self.text = str(cause or record.getMessage())


def _generator(server: list[str] | dict[str, Any]) -> Any:
    """The host's offline engine, with server arguments by name or as its own commands read them from flags."""
    from sglang.multimodal_gen.runtime.entrypoints.cli import utils
    from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator
    from sglang.multimodal_gen.runtime.server_args import ServerArgs
    from sglang.multimodal_gen.runtime.utils.argparse import FlexibleArgumentParser

    # A host that waits for its turn would spin a core; 0.5.21 and 0.5.22 cannot wait otherwise.
    waits = hasattr(ServerArgs, "sleep_on_idle")
    if isinstance(server, dict):
        return DiffGenerator.from_pretrained(**{**({"sleep_on_idle": True} if waits else {}), **server})
    arguments = [*server, "--sleep-on-idle"] if waits else server
    sys.argv[1:] = arguments  # the host looks at it while it builds its parser
    parser = ServerArgs.add_cli_args(FlexibleArgumentParser())
    # The pipeline's own flags came with 0.5.23.
    add_flags = getattr(utils, "add_resolved_pipeline_config_cli_args", None)
    if add_flags is None:
        return DiffGenerator.from_server_args(ServerArgs.from_cli_args(*parser.parse_known_args(arguments)))
    add_flags(parser)
    known, rest = parser.parse_known_args(arguments)
    return DiffGenerator.from_server_args(ServerArgs.from_cli_args(known, rest, argv=arguments))


class Host:
    """The host's offline engine in this process, its workers in children."""

    def __init__(self, server: list[str] | dict[str, Any]):
        from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import logger

        self.errors = LastError()
        self.generator = _generator(server)
        logger.addHandler(self.errors)
        self.workers = [process.pid for process in self.generator.local_scheduler_process or ()]

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """One request's reply; its picture is written after the clock has stopped."""
        self.errors.text = None
        _reset_peaks(self.workers)
        started = time.perf_counter()
        try:
            result = self.generator.generate(sampling_params_kwargs={
                "save_output": False, "return_file_paths_only": False, **job["request"],
            })
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        seconds = time.perf_counter() - started
        if result is None:
            return {"error": self.errors.text or "the host returned nothing"}
        result = result[0] if isinstance(result, list) else result
        if job.get("picture"):
            save(np.stack([np.asarray(frame) for frame in result.frames]), Path(job["picture"]))
        return {
            "seconds": seconds, "metrics": result.metrics, "peak_memory_mb": result.peak_memory_mb or None,
            "peak_rss_mb": _peak_rss(self.workers), "error": None,
        }


def save(frames: np.ndarray, path: Path) -> None:
    """Frames (count, height, width, 3), uint8, as ``path`` (.npy); a single one without the first axis."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, frames if len(frames) > 1 else frames[0])


def _reset_peaks(pids: list[int]) -> None:
    for pid in pids:
        try:
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        except OSError:
            return


def _peak_rss(pids: list[int]) -> float | None:
    """Peak resident memory of the workers together since the last reset, MiB."""
    total = 0
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return None
        total += next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return total / 1024 or None


def main() -> None:
    """Serve jobs until stdin ends."""
    replies = open(int(sys.argv[1]), "w", encoding="utf-8")  # noqa: SIM115 - open as long as the process

    def reply(what: dict[str, Any]) -> None:
        replies.write(json.dumps(what) + "\n")
        replies.flush()

    started = time.perf_counter()
    try:
        host = Host(json.loads(sys.stdin.readline())["server"])
    except Exception as error:
        reply({"error": f"{type(error).__name__}: {error}"})
        raise
    reply({"start_s": time.perf_counter() - started, "error": None})
    try:
        for line in sys.stdin:
            reply(host.run(json.loads(line)))
    finally:
        host.generator.shutdown()


if __name__ == "__main__":
    main()
