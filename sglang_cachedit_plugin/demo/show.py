"""``make demo``: six prompts through SGLang, uncached and in three ways faster, with a table and one contact sheet."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import numpy as np
from PIL import Image, ImageDraw

from ..evaluation.quality import psnr
from . import model_dir

PROMPTS = ("red apple", "dog face", "pizza", "camera", "full moon", "hamburger")
STEPS, ROUNDS = 28, 3
UNCACHED, FEWER, DBCACHE, BALANCED = "uncached", "fewer steps", "DBCache defaults", "balanced"
REQUESTS: dict[str, dict[str, Any]] = {
    UNCACHED: {"enable_cache_dit": False},
    BALANCED: {"enable_cache_dit": True, "cache_dit_params": {"profile": "balanced"}},
    # SGLang's settings as SGLang runs them: nothing is corrected.
    DBCACHE: {"enable_cache_dit": True, "cache_dit_params": {"corrector": False}},
    # As many steps as ``balanced`` has computed for the prompt.
    FEWER: {"enable_cache_dit": False},
}
CELL, LABEL, LEFT = 128, 26, 118


@dataclass
class Drawn:
    """One prompt drawn in one way: picture, (height, width, 3) uint8, computed steps, seconds of each round."""

    picture: np.ndarray
    computed: int
    seconds: list[float]


def draw(generator: Any, prompt: str, out: Path, name: str, steps: int = STEPS, **request: Any) -> Drawn:
    """One picture through the host's offline engine."""
    result = generator.generate(
        sampling_params_kwargs={
            "prompt": prompt, "width": CELL, "height": CELL, "num_inference_steps": steps, "seed": 1,
            "output_path": str(out), "output_file_name": f"{name}.png", **request,
        }
    )
    picture = np.asarray(Image.open(result.output_file_path or out / f"{name}.png").convert("RGB"))
    report = result.metrics["cache_dit"]
    return Drawn(picture, report["computed_steps"] if request["enable_cache_dit"] else steps, [report["denoising_s"]])


def draw_all(generator: Any, out: Path, show: TextIO) -> dict[str, list[Drawn]]:
    """Every prompt in every way, turn by turn, in three rounds."""
    drawn: dict[str, list[Drawn]] = {name: [] for name in REQUESTS}
    for request in REQUESTS.values():
        draw(generator, PROMPTS[0], out, "warmup", **request)
    total, done = ROUNDS * len(PROMPTS) * len(REQUESTS), 0
    for turn in range(ROUNDS):
        for index, prompt in enumerate(PROMPTS):
            for name, request in REQUESTS.items():
                steps = drawn[BALANCED][index].computed if name == FEWER else STEPS
                file = f"{prompt}-{name}".replace(" ", "-")
                found = draw(generator, prompt, out, file, steps, **request)
                if turn == 0:
                    drawn[name].append(found)
                else:
                    drawn[name][index].seconds += found.seconds
                done += 1
                print(f"\r[{'#' * (30 * done // total):.<30}] {done}/{total} pictures", end="", file=show, flush=True)
    print(file=show)
    return drawn


def figures(drawn: dict[str, list[Drawn]]) -> dict[str, tuple[float, float, float, float]]:
    """Mean computed steps, seconds of all prompts together, mean and worst PSNR in dB, of each way."""
    found = {}
    for name, pictures in drawn.items():
        quality = [psnr(plain.picture, each.picture) for plain, each in zip(drawn[UNCACHED], pictures, strict=True)]
        seconds = sum(median(each.seconds) for each in pictures)
        computed = float(np.mean([each.computed for each in pictures]))
        found[name] = computed, seconds, float(np.mean(quality)), min(quality)
    return found


def contact_sheet(drawn: dict[str, list[Drawn]], rows: dict[str, tuple[float, float, float, float]]) -> Image.Image:
    """Pictures in labelled rows, prompts above the columns."""
    sheet = Image.new("RGB", (LEFT + CELL * len(PROMPTS), LABEL + CELL * len(drawn)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(PROMPTS):
        pen.text((LEFT + CELL * column + 6, 7), prompt, fill="black")
    for line, (name, pictures) in enumerate(drawn.items()):
        computed, seconds, mean, _ = rows[name]
        label = f"{name}\n{computed:.1f} steps computed\n{seconds:.1f} s"
        pen.text((6, LABEL + CELL * line + 40), label if name == UNCACHED else f"{label}\n{mean:.1f} dB", fill="black")
        for column, each in enumerate(pictures):
            sheet.paste(Image.fromarray(each.picture), (LEFT + CELL * column, LABEL + CELL * line))
    return sheet


def table(rows: dict[str, tuple[float, float, float, float]]) -> str:
    """The figures as text."""
    lines = [f"{'':<18} {'computed':>8} {'seconds':>8} {'speed':>7} {'PSNR mean':>10} {'worst':>6}"]
    for name, (computed, seconds, mean, worst) in rows.items():
        quality = "" if name == UNCACHED else f" {mean:>10.1f} {worst:>6.1f}"
        lines.append(f"{name:<18} {computed:>8.1f} {seconds:>8.2f} {rows[UNCACHED][1] / seconds:>6.2f}x{quality}")
    return "\n".join(lines)


@contextmanager
def quiet(log: Path) -> Iterator[TextIO]:
    """What this process and its workers print goes to ``log``; the terminal is what is yielded."""
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(1), os.dup(2)
    with log.open("w") as file, os.fdopen(os.dup(1), "w") as terminal:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield terminal
        except BaseException:
            print(f"\nwhat SGLang printed is in {log}", file=terminal, flush=True)
            raise
        finally:
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


def main(argv: list[str] | None = None) -> int:
    """Draw, print the table, write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder for the pictures")
    parser.add_argument("--backend", default="sglang", choices=("sglang", "diffusers"))
    parser.add_argument("--port", type=int, default=30510, help="first of the ports that the host may use")
    args = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print("Starting SGLang (imports take most of half a minute) ...", flush=True)
    with quiet(args.out / "sglang.log") as terminal:
        from sglang.multimodal_gen import DiffGenerator

        generator = DiffGenerator.from_pretrained(
            model_path=str(model_dir()), backend=args.backend, warmup_mode="off", attention_backend="torch_sdpa",
            port=args.port, scheduler_port=args.port + 1, master_port=args.port + 2, log_level="error",
        )
        try:
            drawn = draw_all(generator, args.out, terminal)
        finally:
            generator.shutdown()
    drawn = {name: drawn[name] for name in (UNCACHED, FEWER, DBCACHE, BALANCED)}
    rows = figures(drawn)
    sheet = args.out / "contact-sheet.png"
    contact_sheet(drawn, rows).save(sheet)
    print(f"\n{table(rows)}\n\nSeconds: denoising of all six prompts, medians of {ROUNDS} rounds. PSNR in dB.")
    print(f"Pictures and contact sheet: {sheet.parent}, {sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
