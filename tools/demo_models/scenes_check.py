"""How many of the named objects are in a picture: a small convolutional network trained beside the model."""

import textwrap
from pathlib import Path

import torch
from torch import nn

from tools.demo_models.scenes_data import MOST


class Detector(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] -> logits (B, objects): each object where it is seen best. 0.5 M parameters."""

    def __init__(self, objects: int):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, stride, dilation in ((32, 2, 1), (64, 2, 1), (128, 2, 1), (160, 1, 1), (160, 1, 2)):
            layers += [
                nn.Conv2d(channels, width, 3, stride, padding=dilation, dilation=dilation),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.objects = nn.Conv2d(channels, objects, 1)
        nn.init.constant_(self.objects.bias, -6.0)  # most objects are absent in most places

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.objects(self.features(pictures)).amax(dim=(2, 3))


def named(scenes: torch.Tensor, objects: int) -> torch.Tensor:
    """Which objects the rows hold, (B, objects) in {0, 1}."""
    held = scenes[:, 3 : 3 + MOST, None]
    return (held == torch.arange(objects, device=scenes.device)).any(dim=1).float()


@torch.no_grad()
def found(detector: Detector, pictures: torch.Tensor, scenes: torch.Tensor) -> tuple[float, float]:
    """Share of the named objects that are seen, and objects a picture that are seen but not named."""
    logits = torch.cat([detector(part).float() for part in pictures.split(256)])
    wanted = named(scenes, logits.shape[1])
    seen = (logits > 0).float()
    return float((seen * wanted).sum() / wanted.sum()), float((seen * (1 - wanted)).sum(dim=1).mean())


def psnr(pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Of each picture in [-1, 1], (B,) dB."""
    return -10 * ((pictures - references) / 2).square().mean(dim=(1, 2, 3)).log10()


def contact_sheet(pictures: torch.Tensor, captions: list[str], target: Path, columns: int = 8) -> None:
    """Pictures in [-1, 1] at twice their size, each above its caption."""
    from PIL import Image, ImageDraw

    cell, below = 2 * pictures.shape[-1], 78
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * (cell + below)), "white")
    pen = ImageDraw.Draw(sheet)
    pictures = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for index, (picture, line) in enumerate(zip(pictures, captions, strict=True)):
        x, y = index % columns * cell, index // columns * (cell + below)
        sheet.paste(Image.fromarray(picture).resize((cell, cell), Image.Resampling.BICUBIC), (x, y))
        pen.text((x + 3, y + cell + 2), "\n".join(textwrap.wrap(line, 46)), fill="black")
    sheet.save(target)
