"""Where an emoji stands in its picture: one name has several pictures, and the seed chooses among them.

With a single picture a name, the flow from noise to picture is a straight line, any solver draws it exactly
and nothing can be learnt about caching. Four places make the first steps decide something.
"""

import torch
from torch.nn import functional as F

SIDE = 128
SMALL = 0.75  # 96 of 128 pixels: what is left is one image token (16 pixels) on each side
VAE_SHIFT = 8  # pixels


def _maps(scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Scales (B, 2) and shifts in pixels (B, 2) as maps from the picture to the drawing, (B, 2, 3)."""
    return torch.cat([torch.diag_embed(1.0 / scale), (-2.0 / SIDE * shift / scale)[:, :, None]], dim=2)


def centred() -> torch.Tensor:
    """The one placement to begin with: the whole frame, (1, 2, 3)."""
    return _maps(torch.ones(1, 2), torch.zeros(1, 2))


def corners() -> torch.Tensor:
    """At three quarters of its size in each corner, (4, 2, 3)."""
    shift = 0.5 * (1.0 - SMALL) * SIDE
    ends = torch.tensor([[-shift, -shift], [shift, -shift], [-shift, shift], [shift, shift]])
    return _maps(torch.full((4, 2), SMALL), ends)


def jittered(count: int, device) -> torch.Tensor:
    """Mirrored at random and moved by a few pixels, what the VAE sees, (count, 2, 3)."""
    scale = torch.ones(count, 2, device=device)
    scale[:, 0] = torch.randint(0, 2, (count,), device=device) * 2.0 - 1.0
    shift = torch.randint(-VAE_SHIFT, VAE_SHIFT + 1, (count, 2), device=device).float()
    return _maps(scale, shift)


def place(pictures: torch.Tensor, placements: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] at their placements (B, 2, 3); what is uncovered is white."""
    grid = F.affine_grid(placements, list(pictures.shape), align_corners=False)
    return 1.0 - F.grid_sample(1.0 - pictures, grid, align_corners=False)
