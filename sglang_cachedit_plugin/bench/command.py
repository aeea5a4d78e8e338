"""The subcommand at work: checks before anything starts, files at the end."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..config.effective import Defaults
from ..config.sources import FileConfig, read_file
from ..errors import CacheDitError, SettingError
from ..evaluation import quality
from ..evaluation.host_process import HostProcess
from ..integration import sglang_api as host_facts
from . import chart, summary
from .run import Host, Seat, Work, run
from .server import Server
from .server import profiles as server_profiles
from .variants import Variant, arguments, environment, parse_settings, plan

_PACKAGES = ("sglang", "cache-dit", "torch", "diffusers", "sglang-cachedit-plugin")


def bench(args: argparse.Namespace) -> int:
    """Run the comparison; status 1 where a variant failed altogether, 2 for bad options."""
    try:
        variants, work = prepare(args)
    except (CacheDitError, OSError, ValueError) as error:
        print(f"cache-dit: error: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    hosts = "shared" if args.url else args.hosts
    seats = run(variants, work, lambda variant: start(variant, args), hosts=hosts)
    results = collect(seats, args, work, hosts)
    (args.out / "bench.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    rows = results["variants"]
    print(summary.table(rows))
    title = f"{results['model']}, {args.backend} backend, {args.steps} steps, {args.size}"
    chart.write(rows, title, args.steps, args.out / "bench.png")
    for path in work.pictures.glob("*.npy"):
        Image.fromarray(quality.still(quality.load(path))).save(path.with_suffix(".png"))
        if not args.keep_arrays:
            path.unlink()
    print(f"\n{results['machine']['summary']}, {results['date']}. Files: {args.out}/bench.json, bench.png, pictures/")
    return int(any(row["seconds"] is None for row in rows))


def prepare(args: argparse.Namespace) -> tuple[list[Variant], Work]:
    """What is to be done, checked.

    Raises:
        CacheDitError, OSError, ValueError: an option that cannot be used.
    """
    if bool(args.model_path) == bool(args.url):
        raise SettingError("--model-path", args.model_path, "command line", "expected either a model or --url")
    if any(flag.split("=")[0] in ("--cache-dit-config", "--model-path", "--backend") for flag in args.host_flags):
        raise SettingError("--", " ".join(args.host_flags), "command line", "give this option before the --")
    file = read_file(args.cache_dit_config) if args.cache_dit_config else FileConfig()
    profiles = server_profiles(args.url) if args.url else sorted(Defaults(file=file).profiles)
    variants = plan(args.variant, args.stock, args.set, profile=args.profile, profiles=profiles,
                    with_stock=not (args.no_stock or args.url))
    prompts = [*args.prompt]
    if args.prompts:
        lines = args.prompts.read_text(encoding="utf-8").splitlines()
        prompts += [line.strip() for line in lines if line.strip()][: args.limit]
    width, _, height = args.size.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise SettingError("--size", args.size, "command line", "expected WIDTHxHEIGHT in pixels")
    for name, least in (("repeat", 1), ("warmup", 0), ("switches", 0), ("steps", 1)):
        if getattr(args, name) < least:
            raise SettingError(f"--{name}", getattr(args, name), "command line", f"expected at least {least}")
    request: dict[str, Any] = {"width": int(width), "height": int(height), "num_inference_steps": args.steps}
    if args.frames:
        request["num_frames"] = args.frames
    for text in args.request:
        request |= parse_settings(text, "--request")
    return variants, Work(
        prompts=prompts or ["a red apple on a table"], request=request, seed=args.seed, repeat=args.repeat,
        warmup=args.warmup, switches=args.switches, pictures=args.out / "pictures",
    )


def start(variant: Variant, args: argparse.Namespace) -> Host:
    """The host of a variant."""
    if args.url:
        return Server(args.url, args.timeout)
    logs = args.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    flags = arguments(
        variant, args.model_path, args.backend, args.num_gpus, args.host_flags, args.cache_dit_config, logs
    )
    env = environment(variant, logs, sync=not args.no_sync)
    return HostProcess(env, logs / f"{variant.name}.log", args.timeout).start(flags)


def collect(seats: Sequence[Seat], args: argparse.Namespace, work: Work, hosts: str) -> dict[str, Any]:
    """Everything that bench.json holds."""
    records = [record for seat in seats for record in seat.records]
    rows = summary.summarise([seat.variant for seat in seats], records, args.steps, work.pictures)
    for row, seat in zip(rows, seats, strict=True):
        row["start_s"] = seat.start_s
        row["environment"] = seat.variant.environment()
    return {
        "command": "sglang-cachedit " + shlex.join(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {name: host_facts.version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "model": Path(args.model_path).name if args.model_path else args.url,
        "backend": args.backend, "num_gpus": args.num_gpus, "host_flags": args.host_flags,
        "steps": args.steps, "request": dict(work.request), "prompts": list(work.prompts), "seed": work.seed,
        "repeat": work.repeat, "warmup": work.warmup, "hosts": hosts, "interleaved": hosts != "one",
        "synchronised": not args.no_sync,
        "variants": rows,
        "records": records,
    }


def machine() -> dict[str, Any]:
    """Processor, cores and accelerators of this machine."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = _gpus()
    return {"cpu": name, "cores": cores, "gpus": gpus, "threads": os.environ.get("OMP_NUM_THREADS"),
            "summary": ", ".join([*gpus, f"{cores} CPU cores"])}


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


