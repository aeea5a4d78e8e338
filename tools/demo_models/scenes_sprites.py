"""Draw the objects of the scenes once: `python -m tools.demo_models.scenes_sprites OUT.npz`.

Three styles, all from the npm registry (`npm pack`), each under a licence that allows this use:

| style | package | source | licence |
|---|---|---|---|
| 3d | @lobehub/fluent-emoji-3d | Fluent Emoji 3D, Microsoft Corporation | MIT |
| cartoon | @iconify-json/noto | Noto Emoji, Google Inc. | Apache-2.0 |
| flat | @iconify-json/twemoji | Twemoji, Twitter Inc. and contributors | CC BY 4.0 |

All are resized, and some recoloured. OpenMoji (CC BY-SA) is left out because its licence would bind what is made
from it, Apple's because it allows no use. Needs npm and `pip install resvg-py pillow numpy`.
"""

import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

STYLES = ("3d", "cartoon", "flat")
PACKAGES = ("@lobehub/fluent-emoji-3d@1.1.0", "@iconify-json/noto@1.2.9", "@iconify-json/twemoji@1.2.5")
SIZE = 64

# Name in captions, emoji, hue turn in degrees for a colour that the styles do not draw.
OBJECTS = (
    ("cat", "🐈", 0), ("dog", "🐕", 0), ("rabbit", "🐇", 0), ("horse", "🐎", 0), ("cow", "🐄", 0), ("pig", "🐖", 0),
    ("sheep", "🐑", 0), ("elephant", "🐘", 0), ("giraffe", "🦒", 0), ("tiger", "🐅", 0), ("kangaroo", "🦘", 0),
    ("penguin", "🐧", 0), ("duck", "🦆", 0), ("owl", "🦉", 0), ("parrot", "🦜", 0), ("flamingo", "🦩", 0),
    ("rooster", "🐓", 0), ("turtle", "🐢", 0), ("snail", "🐌", 0), ("octopus", "🐙", 0), ("dinosaur", "🦕", 0),
    ("ladybug", "🐞", 0), ("teddy bear", "🧸", 0), ("robot", "🤖", 0), ("snowman", "⛄", 0),
    ("red apple", "🍎", 0), ("green apple", "🍏", 0), ("banana", "🍌", 0), ("strawberry", "🍓", 0), ("orange", "🍊", 0),
    ("pineapple", "🍍", 0), ("watermelon", "🍉", 0), ("carrot", "🥕", 0), ("avocado", "🥑", 0), ("mushroom", "🍄", 0),
    ("hamburger", "🍔", 0), ("birthday cake", "🎂", 0), ("ice cream", "🍦", 0), ("doughnut", "🍩", 0),
    ("cupcake", "🧁", 0), ("red car", "🚗", 0), ("blue car", "🚗", 220), ("green car", "🚗", 120), ("taxi", "🚕", 0),
    ("bus", "🚌", 0), ("fire engine", "🚒", 0), ("tractor", "🚜", 0), ("bicycle", "🚲", 0), ("steam train", "🚂", 0),
    ("sailboat", "⛵", 0), ("rocket", "🚀", 0), ("helicopter", "🚁", 0), ("house", "🏠", 0), ("castle", "🏰", 0),
    ("pine tree", "🌲", 0), ("palm tree", "🌴", 0), ("cactus", "🌵", 0), ("sunflower", "🌻", 0), ("tulip", "🌷", 0),
    ("red balloon", "🎈", 0), ("blue balloon", "🎈", 220), ("green balloon", "🎈", 120), ("gift", "🎁", 0),
    ("football", "⚽", 0), ("basketball", "🏀", 0), ("guitar", "🎸", 0), ("drum", "🥁", 0), ("alarm clock", "⏰", 0),
    ("top hat", "🎩", 0), ("crown", "👑", 0), ("trophy", "🏆", 0), ("backpack", "🎒", 0), ("beach umbrella", "⛱️", 0),
    ("yellow star", "⭐", 0), ("red heart", "❤️", 0), ("blue heart", "💙", 0), ("green heart", "💚", 0),
    ("red book", "📕", 0), ("blue book", "📘", 0), ("green book", "📗", 0),
)  # fmt: skip


def unpack(folder: Path) -> list[Path]:
    """The three packages, each in a folder of its own."""
    found = []
    for package in PACKAGES:
        name = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()
        with tarfile.open(folder / name) as archive:
            archive.extractall(folder / name.removesuffix(".tgz"), filter="data")
        found.append(folder / name.removesuffix(".tgz") / "package")
    return found


def code(emoji: str) -> str:
    return "-".join(f"{ord(char):x}" for char in emoji)


def from_webp(package: Path, emoji: str) -> Image.Image:
    return Image.open(package / "assets" / f"{code(emoji)}.webp").convert("RGBA")


def from_svg(package: Path, emoji: str) -> Image.Image:
    import resvg_py

    icons = json.loads((package / "icons.json").read_text(encoding="utf-8"))
    names = json.loads((package / "chars.json").read_text(encoding="utf-8"))
    name = names.get(code(emoji)) or names[code(emoji.removesuffix("️"))]
    body = icons["icons"][icons.get("aliases", {}).get(name, {}).get("parent", name)]["body"]
    width = icons["width"]
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {spaces} viewBox="0 0 {width} {width}">{body}</svg>'
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=4 * SIZE, height=4 * SIZE))))


def turned(picture: Image.Image, degrees: int) -> Image.Image:
    """The picture with its hue turned."""
    hue, saturation, value = picture.convert("RGB").convert("HSV").split()
    hue = hue.point(lambda h: (h + round(degrees * 256 / 360)) % 256)
    colours = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    colours.putalpha(picture.getchannel("A"))
    return colours


def framed(picture: Image.Image) -> np.ndarray:
    """What is drawn, as large as fits, standing on the middle of the lower edge: (SIZE, SIZE, 4) uint8."""
    picture = picture.convert("RGBa")  # resized with its alpha, so that no edge gets a dark or light rim
    picture = picture.crop(picture.getchannel("a").point(lambda a: 255 * (a > 16)).getbbox())
    scale = SIZE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    canvas = Image.new("RGBa", (SIZE, SIZE))
    canvas.paste(picture.resize((width, height), Image.Resampling.LANCZOS), ((SIZE - width) // 2, SIZE - height))
    return np.asarray(canvas.convert("RGBA"))


def main() -> None:
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        packages = unpack(Path(folder))
        readers = (from_webp, from_svg, from_svg)
        sprites = np.stack(
            [
                [framed(turned(read(package, emoji), hue)) for _, emoji, hue in OBJECTS]
                for read, package in zip(readers, packages, strict=True)
            ]
        )
    np.savez_compressed(target, sprites=sprites, names=np.array([name for name, *_ in OBJECTS]))
    print(f"{sprites.shape[0]} styles of {sprites.shape[1]} objects -> {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
