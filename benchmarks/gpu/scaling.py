"""One picture or video on 1, 2, 4, ... GPUs: uncached, cache-dit alone, and the plugin; with the 3D recipe on 8.

``python benchmarks/gpu/scaling.py`` runs every power of two up to the number of GPUs; weights are random. It prints one
JSON line for each measurement: seconds, efficiency against one GPU, time of a decision, whether the ranks decided and
drew alike. ``--device cpu --worlds 8 --size tiny`` tries 8 processes over gloo without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import launch  # noqa: E402


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", help="comma-separated numbers of processes; default: powers of two up to all GPUs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--family", choices=("flux", "qwen", "wan"), default="flux")
    parser.add_argument("--size", choices=("tiny", "mid", "full"), default="full")
    parser.add_argument("--sides", default="1024,2048", help="pixels of a side, or WIDTHxHEIGHT")
    parser.add_argument("--frames", type=int, default=81, help="of a video")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--out", help="file for JSON lines; seconds of one GPU are read from it too")
    return parser.parse_args()


def start(args: argparse.Namespace) -> int:
    """One start for each number of processes."""
    import torch

    worlds = [int(each) for each in args.worlds.split(",")] if args.worlds else [
        2**power for power in range(7) if 2**power <= torch.cuda.device_count()
    ]
    return max(launch.start(__file__, world, args.device) for world in worlds)


def layouts(world: int) -> dict[str, Any]:
    """Ways to spread over ``world`` ranks, by name."""
    if world == 1:
        return {"one GPU": {}}
    found: dict[str, Any] = {"Ulysses": {"parallelism_config": {"ulysses_size": world, "attention_backend": "native"}}}
    if world % 4 == 0:
        found["Ulysses x TP 2"] = {
            "parallelism_config": {"ulysses_size": world // 2, "tp_size": 2, "attention_backend": "native"}
        }
    if world == 8:
        found["parallel_3d"] = str(ROOT / "configs" / "parallel_3d.yaml")
    return found


def decision_ms(job: Any, tokens: int, width: int) -> float:
    """Milliseconds of one decision on this rank's share of (1, tokens, width), reduced over the mesh."""
    import torch

    from sglang_cachedit_plugin.cache.parallel import mesh_group
    from sglang_cachedit_plugin.cache.similarity import reduced_differences, residual_difference, residual_sums

    group = mesh_group(job.pipe.transformer)
    ranks = torch.distributed.get_world_size(group) if group is not None else 1
    pair = torch.randn(2, 1, max(1, tokens // ranks), width, device=job.device, dtype=job.pipe.transformer.dtype)
    for repeat in range(30):
        if repeat == 10:
            started = time.perf_counter()
        if group is None:
            residual_difference(pair[0], pair[1])
        else:
            reduced_differences(residual_sums(pair[0], pair[1]), group, device=job.device)
    return (time.perf_counter() - started) / 20 * 1e3


def seconds_of_one(out: str | None, key: dict[str, Any]) -> float | None:
    """Seconds of the same run on one GPU, where the file has them."""
    if not out or not Path(out).is_file():
        return None
    rows = [json.loads(line) for line in Path(out).read_text().splitlines()]
    found = [row["seconds"] for row in rows if row["world"] == 1 and all(row.get(k) == v for k, v in key.items())]
    return found[-1] if found else None


def run(args: argparse.Namespace) -> None:
    """All layouts and sizes at this number of ranks."""
    import torch.distributed as dist

    from benchmarks.gpu import measure

    rank, world, device = measure.start()

    def report(row: dict[str, Any], key: dict[str, Any]) -> None:
        alone = seconds_of_one(args.out, key)
        if alone is not None and row.get("seconds"):
            row["efficiency"] = round(alone / row["seconds"] / world, 3)
        if rank == 0:
            launch.keep({"world": world, **key, **row}, args.out)
        dist.barrier()

    for name, config in layouts(world).items():
        job = measure.Job(config, args.family, args.size, device)
        for side, (width, height) in sizes(args).items():
            job.frame(width, height, args.frames)
            tokens, channels = job.shape(width, height, args.frames)
            spent = round(decision_ms(job, tokens, channels), 3)
            key = {"family": args.family, "size": args.size, "side": side, "steps": args.steps}
            uncached = job.measure(None, args.steps)
            report(uncached | {"layout": name}, key | {"run": "uncached"})
            cached = job.measure({**measure.CACHE, "verify_ranks": True}, args.steps)
            off = round(measure.difference(cached["picture"], uncached["picture"]), 4)
            report(cached | {"layout": name, "decision_ms": spent, "off_uncached": off}, key | {"run": "plugin"})
        job.close()
        if name in ("one GPU", "Ulysses"):
            run_stock(args, name, config, device, report)


def run_stock(args: argparse.Namespace, name: str, config: Any, device: Any, report: Any) -> None:
    """The same with cache-dit's own ``enable_cache`` in the plugin's place."""
    from benchmarks.gpu import measure

    job = measure.Job(config, args.family, args.size, device, stock=True)
    for side, (width, height) in sizes(args).items():
        job.frame(width, height, args.frames)
        key = {"family": args.family, "size": args.size, "side": side, "steps": args.steps, "run": "stock"}
        try:
            report(job.measure(None, args.steps) | {"layout": name, "computed": None}, key)
        except Exception as error:
            # What cache-dit alone cannot do is a finding, not an end: 1.5.1 stops at split Qwen-Image and Wan.
            report({"layout": name, "why": f"{type(error).__name__}: {error}"[:200]}, key)
            break
    job.close()


def sizes(args: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Width and height by name."""
    return {
        side: tuple(map(int, side.split("x"))) if "x" in side else (int(side), int(side))
        for side in args.sides.split(",")
    }


def main() -> int:
    """Start the ranks, or be one."""
    args = arguments()
    return launch.be_rank_or(lambda: start(args), lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
