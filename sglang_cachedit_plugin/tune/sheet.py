"""The contact sheet: pictures side by side with their amplified differences from the uncached one."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..evaluation import quality

COLUMNS: Mapping[str, str] = {
    "uncached": "uncached", "chosen": "tuned", "default": "Cache-DiT defaults", "fewer_steps": "fewer steps",
}
MOST_PIXELS = 512
_FACTORS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Cell:
    """One picture of a row, uint8, and what is known of it against the row's reference."""

    column: str
    picture: np.ndarray | None
    difference: np.ndarray | None = None
    psnr: float | None = None
    seconds: float | None = None

    @property
    def figures(self) -> str:
        """What stands beside the picture."""
        parts = [f"{self.psnr:.1f} dB"] if self.psnr is not None else []
        return ", ".join(parts + ([f"{self.seconds:.2f} s"] if self.seconds is not None else []))


@dataclass(frozen=True)
class SheetRow:
    """One prompt's pictures."""

    prompt: str
    seed: Any
    cells: tuple[Cell, ...]


def read(rows: Sequence[Mapping[str, Any]], base: Path) -> list[SheetRow]:
    """Rows of the results' ``sheet``; relative paths are taken from ``base``. A file that is missing is a gap."""
    found = []
    for row in rows:
        pictures = {column: _load(base / path) for column, path in row["images"].items() if path}
        cells = _cells(pictures, row.get("seconds") or {})
        found.append(SheetRow(str(row.get("prompt", "")), row.get("seed"), cells))
    return found


def _cells(pictures: Mapping[str, np.ndarray | None], seconds: Mapping[str, float]) -> tuple[Cell, ...]:
    reference = pictures.get("uncached")
    cells = []
    for column in COLUMNS:
        picture = pictures.get(column)
        if column == "uncached" or picture is None or reference is None or picture.shape != reference.shape:
            cells.append(Cell(column, picture, seconds=seconds.get(column)))
            continue
        difference = np.abs(picture.astype(np.int16) - reference.astype(np.int16)).astype(np.uint8)
        cells.append(Cell(column, picture, difference, quality.psnr(reference, picture), seconds.get(column)))
    return tuple(cells)


def _load(path: Path) -> np.ndarray | None:
    try:
        return quality.still(quality.load(path))
    except OSError:
        return None


def amplification(rows: Sequence[SheetRow]) -> int:
    """One factor for all differences: the largest that leaves 99 % of the middle one unclipped."""
    parts = [np.percentile(cell.difference, 99) for row in rows for cell in row.cells if cell.difference is not None]
    high = np.median(parts) if parts else 0.0
    return max((factor for factor in _FACTORS if factor * high <= 255), default=1)


def amplified(difference: np.ndarray, factor: int) -> np.ndarray:
    """The difference made visible, uint8."""
    return np.minimum(difference.astype(np.int32) * factor, 255).astype(np.uint8)


def data_uri(picture: np.ndarray) -> str:
    """The picture inside the page: PNG where it is small, else JPEG of at most 512 pixels."""
    image = Image.fromarray(picture)
    small = max(image.size) <= 192
    image.thumbnail((MOST_PIXELS, MOST_PIXELS))
    out = io.BytesIO()
    image.save(out, "PNG") if small else image.save(out, "JPEG", quality=90)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(out.getvalue()).decode()}"


def page_rows(rows: Sequence[SheetRow], factor: int) -> list[dict[str, Any]]:
    """Rows as the page's template takes them."""
    return [
        {
            "prompt": row.prompt,
            "seed": row.seed,
            "cells": [
                {
                    "caption": COLUMNS[cell.column],
                    "figures": cell.figures,
                    "picture": None if cell.picture is None else data_uri(cell.picture),
                    "difference": None if cell.difference is None else data_uri(amplified(cell.difference, factor)),
                }
                for cell in row.cells
            ],
        }
        for row in rows
    ]


def write_png(rows: Sequence[SheetRow], factor: int, path: Path, side: int = 192) -> None:
    """The sheet as one picture: for each prompt the pictures, below them the differences times ``factor``."""
    label, gap = 20, 6
    high = label + 2 * (side + gap)
    sheet = Image.new("RGB", (len(COLUMNS) * (side + gap) + gap, label + high * len(rows)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for index, caption in enumerate(COLUMNS.values()):
        text = caption if index == 0 else f"{caption} (difference x{factor})"
        pen.text((gap + index * (side + gap), 3), text, fill="black", font=font)
    for line, row in enumerate(rows):
        top = label + line * high
        text = f"{row.prompt.strip()}, seed {row.seed}"
        while pen.textlength(text, font) > side:
            text = text.rstrip("…")[:-1] + "…"
        pen.text((gap, top + 3), text, fill="black", font=font)
        for index, cell in enumerate(row.cells):
            left = gap + index * (side + gap)
            if cell.psnr is not None:
                pen.text((left, top + 3), cell.figures, fill="black", font=font)
            difference = None if cell.difference is None else amplified(cell.difference, factor)
            for level, picture in enumerate((cell.picture, difference)):
                if picture is not None:
                    sheet.paste(_fitted(picture, side), (left, top + label + level * (side + gap)))
    sheet.save(path)


def _fitted(picture: np.ndarray, side: int) -> Image.Image:
    image = Image.fromarray(picture)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
