"""Scripts of this folder as ranks of torch.distributed, and the rows that they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def start(script: str, ranks: int, device: str) -> int:
    """Run ``script`` with this process's arguments on ``ranks`` processes of ``device``; their exit status."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), script,
        *sys.argv[1:],
    ]
    environment = os.environ | {
        "RECIPES_DEVICE": device, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RECIPES_RANK": "1",
    }
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


def be_rank_or(launch: Callable[[], int], work: Callable[[], None]) -> int:
    """``launch`` where a person started the script, ``work`` where ``start`` did."""
    if "RECIPES_RANK" not in os.environ:
        return launch()
    work()
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
    return 0


def import_host() -> None:
    """Import SGLang's platform before anything is measured, where it is installed.

    On CUDA that switches cuDNN's attention off for the whole process (FLUX at 1024 takes 5.4 s instead of 4.9 s). Left
    to the first variant that needs the host, it would fall between the variants that are compared.
    """
    try:
        from sglang.multimodal_gen.runtime.platforms import current_platform  # noqa: F401
    except Exception as error:
        print(f"without SGLang: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def keep(row: dict[str, Any], out: str | None) -> None:
    """Print a row, and add it to a file of JSON lines; pictures stay out."""
    text = json.dumps({name: value for name, value in row.items() if name != "picture"})
    print(text, flush=True)
    if out:
        with open(out, "a", encoding="utf-8") as file:
            file.write(text + "\n")
