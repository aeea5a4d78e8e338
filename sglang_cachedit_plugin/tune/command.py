"""``sglang-cachedit tune``: checks before anything starts, files at the end."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CacheDitError, SettingError, nearest
from ..evaluation.host_process import HostPool, environments
from ..integration import sglang_api
from . import job, report, write
from .evaluate import Evaluator, Grid, Progress, Prompt
from .job import Plan, Result
from .promise import Promise
from .search import growing_window
from .store import Store, fingerprint

BACKENDS = {"native": "sglang", "sglang": "sglang", "diffusers": "diffusers"}
COMMAND_LINE = "command line"
TUNE_LIMIT = 12


def tune(args: argparse.Namespace) -> int:
    """Run; status 2 for options that cannot be used, 130 when interrupted."""
    try:
        plan = prepare(args)
        request, server = _pairs(args.request, "--request"), _pairs(args.server, "--server")
        hosts = environments(args.hosts, int(server.get("num_gpus", 1)))
    except (CacheDitError, OSError) as error:
        print(f"cache-dit: error: {error}", file=sys.stderr)
        return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    progress = Progress(args.quiet)
    backend = BACKENDS[args.backend]
    # Other threads add up in another order.
    threads = hosts[0].get("OMP_NUM_THREADS")
    facts = fingerprint(args.model_path, backend=backend, server=server, threads=threads, **_versions())
    store = Store(args.work / "evaluations", facts)
    arguments = {"model_path": args.model_path, "backend": backend, **server}
    pool = HostPool(arguments, args.work / "record" / str(os.getpid()), hosts)
    evaluator = Evaluator(pool, store, request, progress)
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        results = job.run(plan, evaluator, progress.stage)
        _finish(args, plan, results, evaluator)
    except KeyboardInterrupt:
        progress.end()
        print(f"Interrupted. The same command goes on from what is in {args.work}.", file=sys.stderr)
        return 130
    except CacheDitError as error:
        progress.end()
        print(f"cache-dit: error: {error}", file=sys.stderr)
        return 1
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        pool.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    progress.end()
    return 0


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def prepare(args: argparse.Namespace) -> Plan:
    """What the options ask for.

    Raises:
        SettingError, OSError: an option that cannot be used.
    """
    if not Path(args.model_path).is_dir():
        raise SettingError("--model-path", args.model_path, COMMAND_LINE, "expected a folder")
    grids = [Grid(steps, size) for steps in _whole_numbers(args.steps) for size in _sizes(args.size)]
    target = {
        name: value for name in ("min_psnr", "min_ssim", "speedup", "budget")
        if (value := getattr(args, name)) is not None
    }
    most = min(grid.steps for grid in grids)
    for name, low, high in (("speedup", 1.0, float(most)), ("budget", 1, most), ("min_ssim", 0.0, 1.0)):
        if name in target and not low <= target[name] <= high:
            flag = "--" + name.replace("_", "-")
            raise SettingError(flag, target[name], COMMAND_LINE, f"expected a number from {low:g} to {high:g}")
    for flag, value, low in (("--evaluations", args.evaluations, 0), ("--tune-limit", args.tune_limit, 1),
                             ("--heldout-limit", args.heldout_limit, 1), ("--hosts", args.hosts, 1)):
        if value is not None and value < low:
            raise SettingError(flag, value, COMMAND_LINE, f"expected at least {low}")
    tuning, heldout = _prompts(args)
    promise = _promise(args)
    tuning = tuning[: args.tune_limit or (None if promise else TUNE_LIMIT)]
    if promise is not None and len(grids) > 1:
        raise SettingError("--share", args.share, COMMAND_LINE, "expected one number of steps and one size with it")
    if promise is not None and len(tuning) < promise.needed:
        raise SettingError(
            "--share", args.share, COMMAND_LINE, f"expected {promise.needed} prompts or more for this with confidence "
            f"{args.confidence:g}, found {len(tuning)} beside the held-out ones",
        )
    return Plan(
        grids=grids, tune=tuning, heldout=heldout[: args.heldout_limit], target=target,
        seed=args.seed, evaluations=args.evaluations, shares=_shares(args.shares), promise=promise,
        baselines=_baselines(args.baselines, max(grid.steps for grid in grids)),
    )


def _promise(args: argparse.Namespace) -> Promise | None:
    if args.share is None:
        return None
    if args.min_psnr is None and args.min_ssim is None:
        raise SettingError("--share", args.share, COMMAND_LINE, "expected --min-psnr or --min-ssim with it")
    for flag, value in (("--share", args.share), ("--confidence", args.confidence)):
        if not 0.5 <= value < 1.0:
            raise SettingError(flag, value, COMMAND_LINE, "expected a number from 0.5 to below 1")
    return Promise(args.share, args.confidence)


def _baselines(text: str, steps: int) -> tuple[str, ...]:
    """Beginnings of names of what else is measured; each must begin one that there can be."""
    if text in job.BASELINES:
        return job.BASELINES[text]
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word in job.BASELINES:
            raise SettingError("--baselines", text, COMMAND_LINE, f"{word} stands alone, without other names")
        number = word.rpartition("-")[2][:6]
        budget = min(max(1, int(number)), steps) if number.isdecimal() else 1
        names = [each.name for each in job.others(steps, [budget], lambda budget: growing_window(steps, budget))]
        if not word or not any(name.startswith(word) for name in names):
            families = dict.fromkeys(name.partition("-")[0] for name in names)
            raise SettingError(
                "--baselines", word, COMMAND_LINE,
                f"expected {', '.join(job.BASELINES)}, or beginnings of names with commas: {', '.join(families)}",
                nearest(word, [*job.BASELINES, *families, *names]),
            )
    return tuple(words)


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = [0.0]
    if not all(0.0 < share <= 1.0 for share in shares):
        raise SettingError("--shares", text, COMMAND_LINE, "expected parts above 0 up to 1, such as 0.25,0.5")
    return shares


def _prompts(args: argparse.Namespace) -> tuple[list[Prompt], list[Prompt]]:
    texts = _lines(args.prompts, "--prompts")
    if args.heldout is not None:
        held = _lines(args.heldout, "--heldout")
    else:
        if len(texts) < 3:
            raise SettingError("--prompts", str(args.prompts), COMMAND_LINE, "expected 3 prompts or more, or --heldout")
        held = texts[2::3]
        texts = [text for number, text in enumerate(texts) if number % 3 != 2]
    first = args.seed + len(texts)
    return (
        [Prompt(text, args.seed + number) for number, text in enumerate(texts)],
        [Prompt(text, first + number) for number, text in enumerate(held)],
    )


def _lines(path: Path, flag: str) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if not (lines := [line for line in lines if line]):
        raise SettingError(flag, str(path), COMMAND_LINE, "the file has no prompts")
    return lines


def _whole_numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 2 or len(set(numbers)) < len(numbers):
        raise SettingError("--steps", text, COMMAND_LINE, "expected different whole numbers of at least 2")
    return numbers


def _sizes(text: str) -> list[tuple[int, ...]]:
    try:
        sizes = [tuple(int(part) for part in size.lower().split("x")) for size in text.split(",")]
    except ValueError:
        sizes = [()]
    if any(len(size) not in (2, 3) or min(size) < 1 for size in sizes):
        raise SettingError("--size", text, COMMAND_LINE, "expected WIDTHxHEIGHT such as 1024x1024")
    return sizes


def _pairs(texts: Sequence[str], flag: str) -> dict[str, Any]:
    import yaml

    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise SettingError(flag, text, COMMAND_LINE, "expected NAME=VALUE")
        found[name] = yaml.safe_load(value)
    return found


def _versions() -> dict[str, Any]:
    return {name: sglang_api.version(name) for name in ("sglang", "cache-dit", "sglang-cachedit-plugin", "torch")}


def _finish(args: argparse.Namespace, plan: Plan, results: Sequence[Result], evaluator: Evaluator) -> None:
    model = {"name": Path(args.model_path).name, "backend": args.backend}
    versions = _versions()
    provenance = {
        "command": _command(), "date": datetime.date.today().isoformat(),
        "machine": _machine(),
        "host": versions["sglang"], "cache_dit": versions["cache-dit"], "seed": args.seed,
        "prompts": {"tune": len(plan.tune), "heldout": len(plan.heldout)},
    }
    write.write(args.out, results, provenance, model)
    print(f"\n{args.out}:")
    print("\n".join(write.figures(results)))
    if args.report is not None:
        figures = report.results(plan, results, evaluator, provenance, model, args.report)
        print(f"Report: {report.write_report(figures, args.report)}")


def _machine() -> str:
    import torch

    cores = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    return f"{torch.cuda.get_device_name()}, {cores}" if torch.cuda.is_available() else cores


def _command() -> str:
    return "sglang-cachedit " + shlex.join(_relative(argument) for argument in sys.argv[1:])


def _relative(argument: str) -> str:
    """Paths as seen from here, so that files carry no machine's folders."""
    path = Path(argument)
    return path.name if path.is_absolute() else argument
