"""Does the model draw what it is asked for? `python -m tools.demo_models.evaluate --backend sglang`.

Draws one hundred names through SGLang's offline engine and, for each picture, looks for the nearest of all
training pictures (980 names, four places each) by pixels at a quarter of the size. Needs the font and the
names that data.py renders from.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np

from sglang_cachedit_plugin.demo import model_dir
from tools.demo_models import data

NAMES = Path(__file__).parent / "prompts" / "names.txt"
SIZE = 128
SHRINK = 4


def training_pictures(images: np.ndarray) -> np.ndarray:
    """Every named picture in its four places, made small: (N, 4, pixels) float32 in [0, 1]."""
    import torch

    from tools.demo_models.placements import corners, place

    pictures = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    small = []
    for placement in corners():
        parts = [place(part, placement.expand(len(part), 2, 3)) for part in pictures.split(64)]
        small.append(torch.cat([torch.nn.functional.avg_pool2d(part, SHRINK).flatten(1) for part in parts]))
    return (torch.stack(small, dim=1) * 0.5 + 0.5).numpy()


def nearest(picture: np.ndarray, known: np.ndarray) -> int:
    """Index of the name whose picture is nearest; picture (128, 128, 3) uint8, known as above."""
    cells = picture.astype(np.float32).reshape(SIZE // SHRINK, SHRINK, SIZE // SHRINK, SHRINK, 3) / 255.0
    small = cells.mean(axis=(1, 3)).transpose(2, 0, 1).reshape(-1)
    return int(((known - small) ** 2).sum(axis=2).min(axis=1).argmin())


def draw(backend: str, prompts: list[str], steps: int, seed: int, out: Path) -> list[np.ndarray]:
    """One picture a prompt from one engine, (128, 128, 3) uint8 each."""
    from PIL import Image
    from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator

    generator = DiffGenerator.from_pretrained(
        model_path=str(model_dir()), backend=backend, num_gpus=1, warmup_mode="off"
    )
    pictures = []
    try:
        for index, prompt in enumerate(prompts):
            name = f"{backend}-{steps}-{index:03d}.png"
            generator.generate(
                sampling_params_kwargs={
                    "prompt": prompt, "width": SIZE, "height": SIZE, "num_inference_steps": steps,
                    "seed": seed + index, "output_path": str(out), "output_file_name": name,
                }
            )
            pictures.append(np.asarray(Image.open(out / name).convert("RGB")))
    finally:
        generator.shutdown()
    return pictures


def contact_sheet(pictures: list[np.ndarray], out: Path, columns: int = 10) -> None:
    """All pictures on one sheet."""
    from PIL import Image

    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * SIZE, columns * SIZE, 3), 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        y, x = divmod(index, columns)
        sheet[y * SIZE : (y + 1) * SIZE, x * SIZE : (x + 1) * SIZE] = picture
    Image.fromarray(sheet).save(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("sglang", "diffusers"), default="sglang")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--seed", type=int, default=1, help="of the first picture; each next one adds 1")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--data", type=Path, default=Path("outputs/emoji.npz"), help="built when missing")
    parser.add_argument("--out", type=Path, default=Path("outputs/evaluate"))
    args = parser.parse_args()

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    arrays = data.load(args.data)
    names = arrays["names"].tolist()
    prompts = NAMES.read_text(encoding="utf-8").splitlines()[: args.count]
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    pictures = draw(args.backend, prompts, args.steps, args.seed, args.out)
    spent = time.monotonic() - start
    known = training_pictures(arrays["images"][: len(names)])
    found = [names[nearest(picture, known)] for picture in pictures]
    for prompt, other in zip(prompts, found, strict=True):
        if prompt != other:
            print(f"  {prompt}: nearest is {other}")
    right = sum(prompt == other for prompt, other in zip(prompts, found, strict=True))
    contact_sheet(pictures, args.out / f"{args.backend}-{args.steps}.png")
    print(f"{args.backend}, {args.steps} steps: {right} of {len(prompts)} names nearest, {spent:.0f} s")


if __name__ == "__main__":
    main()
