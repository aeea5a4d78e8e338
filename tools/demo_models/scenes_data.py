"""The training set of the scenes: what stands where, its caption, and the picture.

A scene is a row of twelve whole numbers, drawn on the CPU (`draw_scenes`). What its caption does not name is up to
the seed. `compose` turns rows into pictures on any device, with horizon, light, texture and small shifts at random.
"""

import itertools
import math
import random
import string
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from tools.demo_models import text

SIDE = 128
MOST = 4  # objects in a scene
STYLES = ("a 3d render", "a cartoon", "a flat drawing")  # in the order of the sprites
COLUMNS = (("left", "on the left"), ("middle", "in the middle"), ("right", "on the right"))
ROWS = ("at the back", "at the front")
FOOT = (75.0, 118.0)  # pixels of the lower edge of what stands in a row
SIZE = (37.0, 48.0)  # pixels a side
CENTRE = ((35.0, 64.0, 93.0), (29.0, 64.0, 99.0))  # pixels of a row's columns
# Objects of one row are never neighbours, so that they overlap little.
ONE_ROW = ((), (0,), (1,), (2,), (0, 2))
LAYOUTS = {2: [], 3: [], MOST: []}
for back, front in itertools.product(ONE_ROW, ONE_ROW):
    places = [(0, column) for column in back] + [(1, column) for column in front]  # in the order of drawing
    if len(places) > 1:
        LAYOUTS[len(places)].append(places)


@dataclass(frozen=True)
class Ground:
    """Colour, strength of the texture, and how far the texture is drawn out in depth (planks, grass, sand)."""

    words: str
    colour: tuple[int, int, int]
    amplitude: float
    streak: float


@dataclass(frozen=True)
class Sky:
    """Colours at the top and at the horizon, cover of clouds, density of stars, light, darkness of shadows."""

    words: str
    top: tuple[int, int, int]
    bottom: tuple[int, int, int]
    clouds: float
    stars: float
    light: tuple[float, float, float]
    shadow: float
    hills: float


GROUNDS = (
    Ground("green grass", (92, 158, 62), 0.16, 0.5),
    Ground("yellow sand", (228, 194, 122), 0.07, 1.5),
    Ground("white snow", (236, 241, 248), 0.04, 1.0),
    Ground("a wooden floor", (176, 122, 76), 0.16, 0.06),
    Ground("grey stone", (146, 148, 153), 0.12, 1.0),
    Ground("a red carpet", (176, 50, 56), 0.06, 1.0),
    Ground("brown earth", (126, 88, 60), 0.16, 1.0),
)
WALL = {"clouds": 0.0, "stars": 0.0, "light": (1.0, 0.99, 0.97), "shadow": 0.38, "hills": 0.0}
SKIES = (
    Sky("under a blue sky", (62, 132, 222), (196, 226, 247), 0.8, 0.0, (1.0, 1.0, 1.0), 0.5, 3.0),
    Sky("at sunset", (98, 74, 148), (255, 172, 98), 0.35, 0.0, (1.0, 0.84, 0.7), 0.55, 3.0),
    Sky("at night", (14, 18, 52), (52, 62, 112), 0.0, 0.002, (0.6, 0.66, 0.9), 0.4, 3.0),
    Sky("on a foggy day", (188, 195, 202), (220, 224, 228), 0.2, 0.0, (0.94, 0.96, 0.98), 0.22, 0.0),
    Sky("in front of a pink wall", (240, 172, 190), (250, 196, 208), **WALL),
    Sky("in front of a yellow wall", (246, 210, 110), (250, 224, 146), **WALL),
    Sky("in front of a blue wall", (110, 168, 214), (148, 196, 230), **WALL),
)
# Columns of a row: style, ground, sky, then four objects and four places (-1: none), a place being 3 * row + column.
WIDTH = 3 + 2 * MOST


def is_held_out(objects) -> bool:
    """One set of objects in twenty is never trained on; the check draws from those alone."""
    return sum((index + 1) ** 2 for index in objects) % 20 == 0


def _named(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _joined(parts: list[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def caption(rng: random.Random, names: list[str], style: int, ground: int, sky: int, objects, places) -> str:
    """One of many wordings; it may leave out the style, the surroundings and where things stand."""
    said = rng.choices(("both", "column", "row", "nothing"), (3, 3, 1, 3))[0]
    things = []
    for index, (row, column) in zip(objects, places, strict=True):
        where = {
            "both": f" {ROWS[row]} {COLUMNS[column][0]}", "column": f" {COLUMNS[column][1]}", "row": f" {ROWS[row]}"
        }.get(said, "")  # fmt: skip
        things.append(_named(names[index]) + where)
    rng.shuffle(things)
    lead = rng.choices(("", "a picture of ", "a scene with ", f"{STYLES[style]} of "), (5, 1, 1, 7))[0]
    grounded = f"on {GROUNDS[ground].words}" if rng.random() < 0.8 else ""
    around = " ".join(filter(None, (grounded, SKIES[sky].words if rng.random() < 0.8 else "")))
    if around and rng.random() < 0.25:
        line = f"{around}, {lead}{_joined(things)}"
    else:
        line = lead + _joined(things) + (f", {around}" if around else "")
    return line if rng.random() < 0.85 else f"{line[0].upper()}{line[1:]}."


def draw_scenes(names: list[str], count: int, seed: int, held_out: bool = False) -> tuple[np.ndarray, list[str]]:
    """Rows (count, WIDTH) int64 and their captions; the sets of objects are all held out, or none is."""
    rng = random.Random(seed)
    rows, captions = np.full((count, WIDTH), -1, dtype=np.int64), []
    while len(captions) < count:
        wanted = rng.randint(2, MOST)
        places = rng.choice(LAYOUTS[wanted])
        objects = rng.sample(range(len(names)), wanted)
        if is_held_out(objects) != held_out:
            continue
        style = rng.choices((0, 1, 2), (2, 1, 1))[0]
        ground, sky = rng.randrange(len(GROUNDS)), rng.randrange(len(SKIES))
        row = rows[len(captions)]
        row[:3] = style, ground, sky
        row[3 : 3 + wanted] = objects
        row[3 + MOST : 3 + MOST + wanted] = [3 * r + c for r, c in places]
        captions.append(caption(rng, names, style, ground, sky, objects, places))
    return rows, captions


def make_tokenizers(names: list[str]):
    """CLIP's, trained on captions, and T5's, with every word of them as one piece and every character as another."""
    from transformers import T5Tokenizer

    _, captions = draw_scenes(names, 4000, seed=1)
    words = Counter(word.rstrip(",.") for line in captions for word in line.split())
    pieces = [(f"▁{word}", math.log(count / words.total())) for word, count in words.most_common()]
    characters = ["▁", *(char for char in string.printable if not char.isspace())]
    # A character costs more than any word, so that a word is never spelt.
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces, *((char, -20.0) for char in characters)]
    return text.train_clip_tokenizer(captions), T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def encode(tokenizer, captions: list[str], length: int) -> np.ndarray:
    """Padded as the hosts pad, (captions, length) int64; word by word, which both tokenizers allow, so it is fast."""
    known: dict[str, list[int]] = {}
    empty = tokenizer("").input_ids  # the markers alone
    table = np.full((len(captions), length), tokenizer.pad_token_id, dtype=np.int64)
    for row, line in zip(table, captions, strict=True):
        ids = empty[:-1].copy()
        for word in line.split():
            if word not in known:
                known[word] = tokenizer(word, add_special_tokens=False).input_ids
            ids += known[word]
        ids = ids[: length - 1] + empty[-1:]
        row[: len(ids)] = ids
    return table


class Composer:
    """Sprites and tables of colours on one device."""

    def __init__(self, path: Path, device):
        with np.load(path) as arrays:
            self.names = arrays["names"].tolist()
            sprites = torch.from_numpy(arrays["sprites"]).to(device).float().div_(255).permute(0, 1, 4, 2, 3)
        self.device = device
        sprites = sprites.contiguous()
        sprites[:, :, :3] *= sprites[:, :, 3:]  # premultiplied, so that edges are drawn without rims
        self.sprites = sprites  # (styles, objects, 4, 64, 64)
        # Silhouettes with a margin of an eighth on each side, blurred: what falls on the ground as a shadow.
        alpha = F.pad(F.avg_pool2d(sprites[:, :, 3], 2), (4, 4, 4, 4)).flatten(0, 1)[:, None]
        self.shadows = F.avg_pool2d(F.avg_pool2d(alpha, 5, 1, 2), 3, 1, 1).unflatten(0, sprites.shape[:2])

        def table(values):
            return torch.tensor(values, device=device, dtype=torch.float32)

        self.ground_colour = table([g.colour for g in GROUNDS]) / 255
        self.ground_texture = table([(g.amplitude, g.streak) for g in GROUNDS])
        self.sky_colours = table([(s.top, s.bottom) for s in SKIES]) / 255
        self.sky_light = table([s.light for s in SKIES])
        self.sky_numbers = table([(s.clouds, s.stars, s.shadow, s.hills) for s in SKIES])
        self.places = table(
            [(x, foot, size) for row, foot, size in zip(CENTRE, FOOT, SIZE, strict=True) for x in row]
        )  # (places, 3)

    def _uniform(self, count: int, low: float, high: float) -> torch.Tensor:
        """(count, 1, 1, 1)"""
        return torch.rand(count, 1, 1, 1, device=self.device) * (high - low) + low

    def _noise(self, count: int, *shapes: tuple[int, int]) -> torch.Tensor:
        """Octaves of smooth noise, each half as strong as the one before, about unit spread: (count, 1, SIDE, SIDE)."""
        total = torch.zeros((), device=self.device)
        for octave, shape in enumerate(shapes):
            layer = torch.randn(count, 1, *shape, device=self.device)
            total = total + F.interpolate(layer, (SIDE, SIDE), mode="bicubic", align_corners=False) * 0.6**octave
        return total

    def _sample(self, pictures, x, y):
        """Pictures (B, C, H, W) at coordinates in [-1, 1], each (B, 1, SIDE, SIDE); nothing outside."""
        return F.grid_sample(pictures, torch.cat([x, y], 1).permute(0, 2, 3, 1), align_corners=False)

    @torch.no_grad()
    def compose(self, scenes: torch.Tensor) -> torch.Tensor:
        """Rows (B, WIDTH) -> pictures (B, 3, SIDE, SIDE) in [0, 1]."""
        count = len(scenes)
        style, ground, sky = scenes[:, :3].unbind(1)
        pixels = torch.arange(SIDE, device=self.device) + 0.5
        y, x = pixels.view(1, 1, SIDE, 1).expand(count, 1, SIDE, SIDE), pixels.expand(count, 1, SIDE, SIDE)
        light = self._uniform(count, -1, 1)  # positive: from the left, shadows to the right
        tint = self.sky_light[sky].view(count, 3, 1, 1)
        clouds, stars, darkness, hills = self.sky_numbers[sky].view(count, 4, 1, 1, 1).unbind(1)

        bumps = F.interpolate(torch.randn(count, 1, 1, 5, device=self.device), (1, SIDE), mode="bicubic")
        horizon = self._uniform(count, 46, 58) + hills * bumps
        top, bottom = self.sky_colours[sky].view(count, 2, 3, 1, 1).unbind(1)
        backdrop = torch.lerp(top, bottom, (y / horizon).clamp(0, 1))
        cover = (1.6 * self._noise(count, (8, 4), (16, 8), (32, 16)) - 0.6).sigmoid() * clouds
        backdrop = torch.lerp(backdrop, 0.25 * bottom + 0.75, cover)
        twinkles = (1 - torch.rand(count, 1, SIDE, SIDE, device=self.device) / stars.clamp(min=1e-6)).clamp(min=0)
        backdrop = backdrop + F.avg_pool2d(F.max_pool2d(twinkles, 3, 1, 1), 3, 1, 1)

        # The ground's texture in perspective: what lies far away is denser.
        depth = ((y - horizon) / (SIDE - horizon)).clamp(0, 1)
        amplitude, streak = self.ground_texture[ground].view(count, 2, 1, 1, 1).unbind(1)
        away = 1 / (depth + 0.25)
        grid = torch.cat([(x / SIDE - 0.5) * away * 0.5, away * 0.5 * streak], 1).permute(0, 2, 3, 1)
        texture = torch.randn(count, 1, 48, 48, device=self.device)
        texture = texture + 1.5 * F.interpolate(
            torch.randn(count, 1, 12, 12, device=self.device), (48, 48), mode="bicubic"
        )
        texture = F.grid_sample(texture, grid, padding_mode="reflection", align_corners=False)
        floor = self.ground_colour[ground].view(count, 3, 1, 1) * tint
        floor = floor * (1 + amplitude * (0.3 + 0.7 * depth) * texture)
        floor = floor * (1 - 0.12 * light * (x / SIDE - 0.5) + 0.1 * (depth - 0.5))

        objects, places = scenes[:, 3 : 3 + MOST], scenes[:, 3 + MOST :]
        present = (objects >= 0).float()
        objects, places = objects.clamp(min=0), places.clamp(min=0)
        jitter = torch.rand(count, MOST, 3, device=self.device) * 2 - 1
        centre, base, size = self.places[places].unbind(2)
        centre, base, size = centre + 5 * jitter[..., 0], base + 3 * jitter[..., 1], size * (1 + 0.08 * jitter[..., 2])

        reach, lean = self._uniform(count, 0.2, 0.4), 0.9 * light  # of a cast shadow: into depth, sideways
        shade, placed = torch.zeros_like(x), []
        for slot in range(MOST):
            there, middle, foot, side = (
                values[:, slot].view(count, 1, 1, 1) for values in (present, centre, base, size)
            )
            half = side / 2
            across, up = (x - middle) / half, 1 - (foot - y) / half
            placed.append((slot, there, across, up))
            height = (foot - y) / reach
            cast = self._sample(
                self.shadows[style, objects[:, slot]],
                0.8 * (x - middle - lean * height) / half,
                0.8 * (1 - height / half),
            )
            contact = torch.exp(-((across / 0.7).square() + ((y - foot) / (0.07 * side)).square()))
            shade = torch.maximum(shade, there * torch.maximum(cast, 0.8 * contact))
        floor = floor * (1 - darkness * shade)
        picture = torch.lerp(backdrop, floor, ((y - horizon) / 0.7).sigmoid())
        for slot, there, across, up in placed:
            drawn = self._sample(self.sprites[style, objects[:, slot]], across, up)
            lit = tint * (1 - 0.16 * light * across.clamp(-1, 1) - 0.06 * up.clamp(-1, 1))
            picture = picture * (1 - there * drawn[:, 3:]) + there * drawn[:, :3] * lit
        return picture.clamp(0, 1)
