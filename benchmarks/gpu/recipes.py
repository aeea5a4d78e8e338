"""Every recipe of configs/ on this machine's GPUs: seconds, peak memory, report, and whether the ranks agree.

``python benchmarks/gpu/recipes.py`` starts one process for each GPU and prints a table; ``--out FILE`` keeps the rows
as JSON lines. Weights are random. ``--device cpu --gpus 2 --size tiny`` tries it over gloo without a GPU.
``--qwen`` runs the hybrid recipe at the size of Qwen-Image, 1664x928 with true CFG, against uncached.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import launch  # noqa: E402

EXTRA: dict[str, dict[str, Any]] = {
    "ring": {"parallelism_config": {"ring_size": "auto", "attention_backend": "native"}},
    "ulysses x ring": {"parallelism_config": {"ulysses_size": "auto", "ring_size": 2, "attention_backend": "native"}},
}
"""Ways of splitting that no recipe shows alone."""

LAST = ("parallel_async",)
"""cache-dit patches classes for it, which later pipelines of the process would meet."""

NEEDS = {"parallel_2d": 4, "parallel_3d": 8, "ulysses x ring": 4}
"""Ranks that the sizes need; the number must be a multiple of it."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, help="processes; all GPUs by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("tiny", "mid", "full"), default="mid", help="of the FLUX weights")
    parser.add_argument("--side", type=int, default=1024, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--only", help="comma-separated names of recipes")
    parser.add_argument("--qwen", choices=("tiny", "full"), nargs="?", const="full", help="the run at Qwen-Image size")
    parser.add_argument("--out", help="file for JSON lines")
    return parser.parse_args()


def start(args: argparse.Namespace) -> int:
    """Start the ranks and wait."""
    import torch

    return launch.start(__file__, args.gpus or torch.cuda.device_count(), args.device)


class Table:
    """Rows as they come, on the first rank."""

    def __init__(self, rank: int, out: str | None):
        self._rank, self._out = rank, out

    def add(self, name: str, run: str, row: dict[str, Any]) -> None:
        """Print one row and keep it."""
        if not self._rank:
            launch.keep({"recipe": name, "run": run, **row}, self._out)


def order(names: list[str]) -> list[str]:
    """Recipes in an order in which none disturbs the next."""
    return [name for name in names if name not in LAST] + [name for name in LAST if name in names]


def run_recipe(name: str, config: Any, reference: Any, args: argparse.Namespace, device: Any, table: Table) -> None:
    """One recipe uncached and cached, or the reason why it does not run here."""
    try:
        _run_recipe(name, config, reference, args, device, table)
    except Exception as error:
        # The next recipe has weights of its own; a rank that failed alone is met by the others' timeout.
        table.add(name, "not run", {"why": f"{type(error).__name__}: {error}"[:300]})


def _run_recipe(name: str, config: Any, reference: Any, args: argparse.Namespace, device: Any, table: Table) -> None:
    from benchmarks.gpu import measure

    started = time.perf_counter()
    job = measure.Job(config, "flux", args.size, device)
    uneven = name == "parallel_uaa"
    side = args.side + (16 if uneven else 0)
    job.call = dict(prompt="a red apple", height=args.side, width=side, max_sequence_length=77 if uneven else 512)
    ready = time.perf_counter() - started
    params = {**({} if job.file.source.primary else measure.CACHE), "verify_ranks": True}
    for run, given in (("uncached", None), ("cached", params)):
        row = job.measure(given, args.steps)
        if run in reference and not uneven:
            row["off_single"] = round(measure.difference(row["picture"], reference[run]["picture"]), 4)
        table.add(name, run, row | {"ready_s": round(ready, 1)})
    job.close()


def run_all(args: argparse.Namespace) -> None:
    """All recipes that fit the number of ranks."""
    from benchmarks.gpu import measure

    rank, world, device = measure.start()
    table = Table(rank, args.out)
    if args.qwen:
        run_qwen(args, device, table)
        return
    alone = measure.Job({}, "flux", args.size, device)
    alone.call = dict(prompt="a red apple", height=args.side, width=args.side, max_sequence_length=512)
    reference = {
        "uncached": alone.measure(None, args.steps),
        "cached": alone.measure(measure.CACHE, args.steps),
    }
    for run, row in reference.items():
        table.add("one GPU, nothing split", run, row)
    alone.close()
    configs: dict[str, Any] = {path.stem: str(path) for path in sorted((ROOT / "configs").glob("*.yaml"))} | EXTRA
    names = args.only.split(",") if args.only else list(configs)
    for name in order(names):
        if world % NEEDS.get(name, 1) or (name == "parallel_3d" and world != 8):
            table.add(name, "not run", {"why": f"needs {NEEDS[name]} ranks, here are {world}"})
            continue
        run_recipe(name, configs[name], reference, args, device, table)


def run_qwen(args: argparse.Namespace, device: Any, table: Table) -> None:
    """The hybrid recipe at the size of Qwen-Image against uncached, unsplit and split."""
    from benchmarks.gpu import measure

    tiny = args.qwen == "tiny"
    hybrid = str(ROOT / "configs" / "hybrid.yaml")
    width, height = (64, 64) if tiny else (1664, 928)
    for name, config in (("one GPU, nothing split", {}), ("hybrid", hybrid)):
        job = measure.Job(config, "qwen", args.qwen, device)
        job.call = dict(
            prompt=job.prompt("a coffee shop with a chalkboard sign"), negative_prompt=job.prompt("blurred"),
            true_cfg_scale=4.0, width=width, height=height,
        )
        runs = [("uncached", None)] + ([("cached", {"verify_ranks": True})] if config else [])
        for run, params in runs:
            table.add(f"Qwen-Image size: {name}", run, job.measure(params, args.steps))
        job.close()


def main() -> int:
    """Start the ranks, or be one."""
    args = arguments()
    return launch.be_rank_or(lambda: start(args), lambda: run_all(args))


if __name__ == "__main__":
    sys.exit(main())
