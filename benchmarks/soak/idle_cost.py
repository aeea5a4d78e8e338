"""What the plugin costs while it is installed and caches nothing: ``python -m benchmarks.soak.idle_cost``.

Takes about eighteen minutes on two cores, which should have nothing else to do.

Three hosts answer the same requests in turn: one without the plugin, another one without it, and one with the plugin
and no caching configured. Each turn asks all three in an order of its own. The ratio to the first is taken turn by
turn; that of the second host shows what the machine alone makes of it. Hosts are started anew every round, because
two processes of the same program differ too. The model is tiny, so a cost by step or by request shows here first.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from sglang_cachedit_plugin.bench import variants
from sglang_cachedit_plugin.bench.run import reading
from sglang_cachedit_plugin.bench.variants import PLUGIN, UNCACHED, Variant
from sglang_cachedit_plugin.evaluation.host_process import HostError, HostProcess

WITHOUT, CONTROL, WITH = "without", "without again", "with"
VARIANTS = {WITHOUT: UNCACHED, CONTROL: UNCACHED, WITH: PLUGIN}
MEASURES = ("seconds", "denoising_s", "cpu_s")
DRAWS = 2000


class Measured:
    """One host process, and the CPU time of it and its workers."""

    def __init__(self, name: str, args: argparse.Namespace, model: Path, folder: Path):
        variant = Variant(name=name.replace(" ", "-"), kind=VARIANTS[name])
        flags = ["--attention-backend", "torch_sdpa"]
        arguments = variants.arguments(variant, str(model), args.backend, 1, flags, None, folder)
        environment = variants.environment(variant, folder, sync=False)
        self.host = HostProcess(environment, folder / f"{variant.name}.log", timeout=300).start(arguments)
        own = psutil.Process(self.host.process.pid)
        self.processes = [own, *own.children(recursive=True)]

    def cpu(self) -> float:
        """Seconds of CPU that its processes have used, by the scheduler's own count: ticks are too coarse."""
        spent = 0
        for process in self.processes:
            for path in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
                with suppress(OSError):  # a thread that ended meanwhile
                    spent += int(path.read_text().split()[0])
        return spent / 1e9

    def ask(self, request: dict[str, Any]) -> dict[str, float]:
        """One request's figures."""
        before = self.cpu()
        found = reading(self.host.run(request))
        if found["error"]:
            raise HostError(found["error"])
        if found["enabled"]:
            raise HostError("caching is on")
        return {"cpu_s": self.cpu() - before, **{name: found[name] for name in ("seconds", "denoising_s")}}


def play_round(args: argparse.Namespace, model: Path, folder: Path, order: random.Random) -> list[dict[str, Any]]:
    """The turns of one round: each measure of each host."""
    request = {
        "prompt": "red apple", "seed": 1, "width": args.size, "height": args.size, "num_inference_steps": args.steps,
    }
    with ExitStack() as stack:
        made = {}
        for name in VARIANTS:
            made[name] = Measured(name, args, model, folder)
            stack.callback(made[name].host.close)
            print(f"the host {name} the plugin is up", file=sys.stderr, flush=True)
        turns = []
        for turn in range(args.warmup + args.turns):
            names = list(VARIANTS)
            order.shuffle(names)
            found = {name: made[name].ask(request) for name in names}
            if turn >= args.warmup:
                turns.append(found)
    return turns


def ratios(turns: list[dict[str, Any]], name: str, measure: str) -> list[float]:
    """Ratio of a host to the first one, turn by turn."""
    return [turn[name][measure] / turn[WITHOUT][measure] for turn in turns if turn[WITHOUT][measure] > 0]


def spread(values: list[float], draws: random.Random) -> tuple[float, float, float]:
    """The median, and the 95 % interval of it over resampled values."""
    drawn = sorted(median(draws.choices(values, k=len(values))) for _ in range(DRAWS))
    return median(values), drawn[int(0.025 * DRAWS)], drawn[int(0.975 * DRAWS)]


def report(rounds: list[list[dict[str, Any]]], seed: int) -> dict[str, Any]:
    """Medians of each host, and ratios over all turns with their spread, and by round."""
    turns, draws = [turn for each in rounds for turn in each], random.Random(seed)
    found: dict[str, Any] = {"turns": len(turns), "rounds": len(rounds)}
    for measure in MEASURES:
        medians = {name: round(median(turn[name][measure] for turn in turns), 5) for name in VARIANTS}
        found[measure] = {"median": medians}
        for name in (CONTROL, WITH):
            middle, low, high = spread(ratios(turns, name, measure), draws)
            by_round = [round(median(ratios(each, name, measure)), 4) for each in rounds]
            found[measure][f"{name} / {WITHOUT}"] = {
                "ratio": round(middle, 4), "95 %": [round(low, 4), round(high, 4)], "by round": by_round,
            }
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak.idle_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="each starts three hosts")
    parser.add_argument("--turns", type=int, default=40, help="of a round")
    parser.add_argument("--warmup", type=int, default=4, help="turns of a round that are not counted")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--backend", choices=("sglang", "diffusers"), default="sglang")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="a FLUX folder; without it one of six blocks is built")
    args = parser.parse_args()
    order = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            from tests.tiny.build import flux

            args.model = flux(Path(folder), 3, 3)
        rounds = []
        for number in range(args.rounds):
            rounds.append(play_round(args, args.model, Path(folder) / str(number), order))
            print(f"round {number + 1} of {args.rounds} is done", file=sys.stderr, flush=True)
    print(json.dumps(report(rounds, args.seed), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
