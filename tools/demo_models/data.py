"""The training set: Noto Color Emoji drawn on white, with their names.

Source of the pictures: the font of the Debian package `fonts-noto-color-emoji` (SIL Open Font Licence 1.1).
Source of names and groups: `emoji-test.txt` of the Debian package `unicode-data` (Unicode licence).
"""

import argparse
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")
SIZE = 128
STRIKE = 109  # the font holds one bitmap size; any other is refused
GROUPS = (
    "Smileys & Emotion",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
)
# Twenty-four clock faces that differ in one hand would only teach the model to mix them up.
LEFT_OUT = re.compile(r"o'clock|-thirty|^flag")

# `{n}` is the name, `{a}` the name with its article, `{N}` the name with a capital.
TEMPLATES = (
    "{n}",
    "{N}",
    "{a}",
    "emoji of {a}",
    "an emoji of {a}",
    "{a} emoji",
    "{n} emoji",
    "a picture of {a}",
    "a photo of {a}",
    "an icon of {a}",
    "{n} on a white background",
    "A small drawing of {a}.",
)


@dataclass(frozen=True)
class Emoji:
    """One emoji: its character, its CLDR short name, its Unicode name, its group."""

    char: str
    name: str
    alias: str
    group: str


def _clean(name: str) -> str:
    return name.replace("’", "'").replace("“", "").replace("”", "").strip().lower()


def read_emoji(path: Path = EMOJI_TEST) -> list[Emoji]:
    """Every emoji of one code point (a variation selector aside), in the file's order."""
    found: list[Emoji] = []
    group = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.split(":", 1)[1].strip()
        match = re.match(r"^([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (.+)$", line)
        if not match:
            continue
        codes = [int(code, 16) for code in match[1].split()]
        if [code for code in codes[1:] if code != 0xFE0F]:
            continue
        char = chr(codes[0])
        alias = _clean(unicodedata.name(char, match[2]))
        found.append(Emoji(char, _clean(match[2]), alias, group))
    return found


def is_named(emoji: Emoji) -> bool:
    """Whether the model learns this one by name (the others only train the VAE)."""
    return emoji.group in GROUPS and not LEFT_OUT.search(emoji.name)


def unique_aliases(emoji: list[Emoji]) -> list[str]:
    """The Unicode name where it names one emoji only, the CLDR name otherwise."""
    names = {e.name for e in emoji}
    aliases = [e.alias for e in emoji]
    return [
        e.alias if e.alias not in names and aliases.count(e.alias) == 1 else e.name for e in emoji
    ]


def prompts_for(name: str) -> list[str]:
    """Every template filled with one name."""
    article = "an" if name[:1] in "aeiou" else "a"
    words = {"n": name, "N": name[:1].upper() + name[1:], "a": f"{article} {name}"}
    return [template.format(**words) for template in TEMPLATES]


def render(char: str, font, size: int = SIZE) -> np.ndarray:
    """One emoji on white, (size, size, 3) uint8."""
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (144, 144), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((72, 72), char, font=font, embedded_color=True, anchor="mm")
    return np.asarray(canvas.resize((size, size), Image.Resampling.LANCZOS))


def build(target: Path, font_path: Path = FONT, emoji_test: Path = EMOJI_TEST) -> None:
    """Render everything once and write it to an npz file.

    images (M, 128, 128, 3) uint8, the first N of them named; names, aliases (N,).
    """
    from PIL import ImageFont

    font = ImageFont.truetype(str(font_path), STRIKE)
    everything = read_emoji(emoji_test)
    drawn: list[np.ndarray] = []
    kept: list[Emoji] = []
    seen: set[bytes] = set()
    for emoji in sorted(everything, key=lambda e: not is_named(e)):
        picture = render(emoji.char, font)
        if picture.min() > 250 or picture.tobytes() in seen:
            continue
        seen.add(picture.tobytes())
        drawn.append(picture)
        kept.append(emoji)
    named = [emoji for emoji in kept if is_named(emoji)]
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        target,
        images=np.stack(drawn),
        names=np.array([emoji.name for emoji in named]),
        aliases=np.array(unique_aliases(named)),
    )
    print(f"{len(drawn)} pictures, {len(named)} of them named -> {target.name}")


def load(path: Path) -> dict[str, np.ndarray]:
    """The set written by build(), built first when it is missing."""
    if not path.exists():
        build(path)
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    build(parser.parse_args().target)


if __name__ == "__main__":
    main()
