"""The table of docs/benchmarks.md over 1, 2, 4, ... GPUs of one machine, in one command.

    python -m benchmarks.gpu.scaling_table [--gpus 4] [--seconds 560] [--only flux-1,wan-4,...]

Starts ``scaling_loops`` on every number of GPUs. Parts that leave GPUs free run beside others, each on GPUs of its
own; the most valuable ones come first, each has a time limit, and what does not fit into the time is named. Rows are
printed as they come and written to $OUT; the table is printed last. ``--device cpu`` tries all with tiny transformers
over gloo.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass
class Part:
    """One process group on GPUs of its own.

    Args:
        seconds: what it takes on H200; it is not begun with less time left, and ended at 1.6 times that, or 8 times
            where gloo processes share a CPU.
    """

    name: str
    gpus: int
    seconds: float
    module: str = "benchmarks.gpu.scaling_loops"
    options: tuple[str, ...] = ()
    on: tuple[int, ...] = ()
    process: Any = None
    ends: float = 0.0
    outcome: str = "no time left"


def parts(gpus: int) -> list[Part]:
    """What is run, in order of value: one GPU to compare with, all of them, then those between."""

    def loops(name: str, count: int, seconds: float, *options: str) -> Part:
        return Part(name, count, seconds, options=("--work", name.split("-")[0], *options))

    found = [loops("flux-1", 1, 85)]
    found += [loops(f"wan-1-{each}", 1, 105, "--variants", each) for each in ("uncached", "plugin", "stock")]
    sizes = [2**power for power in range(1, 7) if 2**power <= gpus]
    for count in sorted(sizes, reverse=True):
        names = [name for name in ("ulysses", "cfg", "tp") if count > 2 or name != "tp"]
        # Where several groups fit side by side, each takes one layout of the slow model.
        shares = [[name] for name in names] if count < gpus else [names]
        found.append(loops(f"flux-{count}", count, 40 + 100 / count))
        found += [
            loops(f"wan-{count}-{'-'.join(each)}", count, 45 + 160 * len(each) / count, "--layouts", ",".join(each))
            for each in shares
        ]
    doubted = ("--only", "ulysses,ring", "--seconds", "45")
    return [*found, Part("ranks", max(sizes, default=1), 40, "benchmarks.gpu.ranks", doubted)]


@dataclass
class Machine:
    """Starts parts on free GPUs, in order, and ends what runs too long."""

    gpus: int
    deadline: float
    out: Path
    tiny: bool
    running: list[Part] = field(default_factory=list)

    def start(self, part: Part) -> None:
        """Begin ``part`` on free GPUs, which must be there."""
        taken = {gpu for each in self.running for gpu in each.on}
        part.on = tuple(gpu for gpu in range(self.gpus) if gpu not in taken)[: part.gpus]
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(part.gpus), "-m",
            part.module, *part.options, *(("--tiny",) if self.tiny else ()),
        ]
        own = self.out / part.name
        own.mkdir(parents=True, exist_ok=True)
        if part.module == "benchmarks.gpu.scaling_loops":
            command += ["--out", str(own / "rows.jsonl")]
        visible = "" if self.tiny else ",".join(map(str, part.on))
        environment = {
            # NVLink multicast fails inside some containers.
            "NCCL_NVLS_ENABLE": "0", **os.environ, "CUDA_VISIBLE_DEVICES": visible, "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "OUT": str(own),
        }
        part.ends = min(time.monotonic() + (8 if self.tiny else 1.6) * part.seconds, self.deadline)
        print(f"# {part.name} begins on {part.on}", flush=True)
        with open(own / "errors.txt", "w") as errors:
            part.process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=errors)
        self.running.append(part)

    def reap(self) -> None:
        """Take leave of parts that ended, and end those that ran too long."""
        for part in list(self.running):
            status = part.process.poll()
            if status is None and time.monotonic() < part.ends:
                continue
            if status is None:
                part.outcome = "ended at its time limit"
                self.end(part)
            else:
                part.outcome = "done" if status == 0 else f"exit status {status}: {last_line(self.out / part.name)}"
            print(f"# {part.name}: {part.outcome}", flush=True)
            self.running.remove(part)

    @staticmethod
    def end(part: Part) -> None:
        """End a part's processes; its ranks have sessions of their own."""
        for pid in [*descendants(part.process.pid), part.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        part.process.wait()

    def run(self, todo: Iterable[Part]) -> None:
        """All parts that fit; none outlives this process."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
        try:
            self._run(todo)
        finally:
            for part in self.running:
                self.end(part)

    def _run(self, todo: Iterable[Part]) -> None:
        for part in todo:
            while part.gpus > self.gpus - sum(each.gpus for each in self.running):
                self.reap()
                time.sleep(0.1)
            if part.gpus <= self.gpus and self.deadline - time.monotonic() > part.seconds:
                self.start(part)
        while self.running:
            self.reap()
            time.sleep(0.1)


def descendants(pid: int) -> list[int]:
    """Processes that ``pid`` started, and those that they started."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [*descendants(child), child]
    return found


def last_line(folder: Path) -> str:
    """Of what a part complained of."""
    lines = [line for line in (folder / "errors.txt").read_text(errors="replace").splitlines() if "Error" in line]
    return lines[-1][:200] if lines else ""


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Every measurement, with its efficiency against one GPU."""
    rows = [json.loads(line) for file in sorted(out.glob("*/rows.jsonl")) for line in file.read_text().splitlines()]
    alone = {(r["work"], r["size"], r["variant"]): r["seconds"] for r in rows if r["gpus"] == 1 and "seconds" in r}
    for row in rows:
        one = alone.get((row["work"], row["size"], row["variant"]))
        if one is not None and "seconds" in row:
            row["efficiency"] = round(one / row["seconds"] / row["gpus"], 3)
    return sorted(rows, key=lambda r: (r["work"], r["size"], r["gpus"], r["layout"], r["variant"] != "uncached"))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line a layout and size."""
    lines = [
        "| model | size | GPUs | layout | uncached s | stock s | plugin s | computed of all | "
        "decision us, stock / plugin | efficiency uncached / stock / plugin | ranks agree | NCCL share uncached |",
        "|" + "---|" * 12,
    ]
    keys = list(dict.fromkeys((r["work"], r["size"], r["gpus"], r["layout"]) for r in rows if "why" not in r))
    for key in keys:
        mine = {r["variant"]: r for r in rows if (r["work"], r["size"], r["gpus"], r["layout"]) == key}

        def cell(variant: str, name: str, form: str = "", mine: dict[str, Any] = mine) -> str:
            value = mine.get(variant, {}).get(name)
            return "" if value is None else format(value, form)

        def each(name: str, form: str, *variants: str, cell: Any = cell) -> str:
            return " / ".join(cell(variant, name, form) for variant in variants)

        plugin = mine.get("plugin", {})
        of = f"{plugin['computed']} of {plugin['computed'] + plugin['cached']}" if plugin else ""
        lines.append("| " + " | ".join([
            *map(str, key), *(cell(variant, "seconds", ".2f") for variant in ("uncached", "stock", "plugin")), of,
            each("decision_us", ".0f", "stock", "plugin"), each("efficiency", ".2f", "uncached", "stock", "plugin"),
            cell("plugin", "equal_decisions"), cell("uncached", "communication", ".2f"),
        ]) + " |")
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, help="all by default")
    parser.add_argument("--seconds", type=float, default=560.0, help="for everything")
    parser.add_argument("--only", help="names of parts, by comma; or the beginnings of names")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    started = time.monotonic()
    gpus = args.gpus
    if gpus is None:
        import torch

        gpus = torch.cuda.device_count()
    out = Path(os.environ.get("OUT") or "outputs/scaling")
    todo = [p for p in parts(gpus) if not args.only or p.name.startswith(tuple(args.only.split(",")))]
    Machine(gpus, started + args.seconds, out, args.device == "cpu").run(todo)
    rows = rows_of(out)
    outcomes = {part.name: part.outcome for part in todo}
    (out / "scaling.json").write_text(json.dumps({"parts": outcomes, "rows": rows}, indent=1))
    for row in rows:
        if "why" in row:
            print(f"# {row['work']} {row['layout']} {row['variant']}: {row['why']}")
    print(*(f"# {name}: {outcome}" for name, outcome in outcomes.items() if outcome != "done"), sep="\n")
    print(f"\n{time.monotonic() - started:.0f} s\n{table(rows)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
