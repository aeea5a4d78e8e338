"""``make demo``: six prompts through SGLang, uncached and cached, with a table and one contact sheet."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..evaluation.quality import psnr, ssim
from . import model_dir

PROMPTS = ("red apple", "dog face", "pizza", "camera", "full moon", "hamburger")
STEPS = 28
CELL, LABEL = 128, 26


@dataclass
class Drawn:
    """One picture, (height, width, 3) uint8, and what its report says."""

    picture: np.ndarray
    report: dict[str, Any]

    @property
    def seconds(self) -> float:
        """Denoising time."""
        return self.report["denoising_s"]


def draw(generator: Any, prompt: str, out: Path, name: str, **request: Any) -> Drawn:
    """One picture through the host's offline engine."""
    result = generator.generate(
        sampling_params_kwargs={
            "prompt": prompt, "width": CELL, "height": CELL, "num_inference_steps": STEPS, "seed": 1,
            "output_path": str(out), "output_file_name": f"{name}.png", **request,
        }
    )
    picture = np.asarray(Image.open(result.output_file_path or out / f"{name}.png").convert("RGB"))
    return Drawn(picture, result.metrics["cache_dit"])


def row(prompt: str, plain: Drawn, cached: Drawn) -> str:
    """One line of the table."""
    report = cached.report
    return (
        f"{prompt:<12} {plain.seconds:>9.2f} {cached.seconds:>8.2f} "
        f"{report['computed_steps']:>5} / {report['cached_steps']:<5} {plain.seconds / cached.seconds:>7.2f}x "
        f"{psnr(plain.picture, cached.picture):>7.1f} {ssim(plain.picture, cached.picture):>6.3f}"
    )


def contact_sheet(rows: dict[str, list[np.ndarray]], prompts: tuple[str, ...]) -> Image.Image:
    """Pictures in labelled rows, prompts above the columns."""
    left = 70
    sheet = Image.new("RGB", (left + CELL * len(prompts), LABEL + CELL * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        pen.text((left + CELL * column + 6, 7), prompt, fill="black")
    for line, (label, pictures) in enumerate(rows.items()):
        pen.text((6, LABEL + CELL * line + CELL // 2), label, fill="black")
        for column, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (left + CELL * column, LABEL + CELL * line))
    return sheet


def main(argv: list[str] | None = None) -> int:
    """Draw, print the table, write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder for the pictures")
    parser.add_argument("--backend", default="sglang", choices=("sglang", "diffusers"))
    parser.add_argument("--port", type=int, default=30510, help="first of the ports that the host may use")
    args = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print("Starting SGLang (imports take most of half a minute) ...", flush=True)
    from sglang.multimodal_gen import DiffGenerator

    generator = DiffGenerator.from_pretrained(
        model_path=str(model_dir()), backend=args.backend, warmup_mode="off", attention_backend="torch_sdpa",
        port=args.port, scheduler_port=args.port + 1, master_port=args.port + 2, log_level="error",
    )
    try:
        plain, cached = _draw_all(generator, args.out)
    finally:
        generator.shutdown()
    sheet = args.out / "contact-sheet.png"
    contact_sheet(
        {"uncached": [d.picture for d in plain], "cached": [d.picture for d in cached]}, PROMPTS
    ).save(sheet)
    _print_table(plain, cached, sheet)
    return 0


def _draw_all(generator: Any, out: Path) -> tuple[list[Drawn], list[Drawn]]:
    plain, cached = [], []
    started = time.perf_counter()
    draw(generator, PROMPTS[0], out, "warmup", enable_cache_dit=True)
    for index, prompt in enumerate(PROMPTS):
        name = prompt.replace(" ", "-")
        plain.append(draw(generator, prompt, out, f"{name}-uncached", enable_cache_dit=False))
        cached.append(draw(generator, prompt, out, f"{name}-cached", enable_cache_dit=True))
        done = 2 * (index + 1)
        bar = "#" * done + "." * (2 * len(PROMPTS) - done)
        print(f"\r[{bar}] {done}/{2 * len(PROMPTS)} pictures, {time.perf_counter() - started:.0f} s",
              end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return plain, cached


def _print_table(plain: list[Drawn], cached: list[Drawn], sheet: Path) -> None:
    print(f"\n{'prompt':<12} {'uncached':>9} {'cached':>8} {'comp. / cached':>13} {'speed':>8} {'PSNR':>7} {'SSIM':>6}")
    for line in map(row, PROMPTS, plain, cached):
        print(line)
    total, total_cached = sum(d.seconds for d in plain), sum(d.seconds for d in cached)
    mean = np.mean([psnr(p.picture, c.picture) for p, c in zip(plain, cached, strict=True)])
    print(f"{'all':<12} {total:>9.2f} {total_cached:>8.2f} {'':>13} {total / total_cached:>7.2f}x {mean:>7.1f}")
    print(f"\nSeconds are denoising time. Pictures and contact sheet: {sheet.parent}, {sheet}")


if __name__ == "__main__":
    sys.exit(main())
