"""diffusers' transformers at their full sizes with random weights, and inputs that drift from step to step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, WanTransformer3DModel
from torch import nn


@dataclass
class Work:
    """Transformers, their inputs, and where the loop stands."""

    modules: dict[str, nn.Module]
    inputs: dict[str, dict[str, Any]]
    steps: int
    repeats: int
    timestep: Any
    scale: int = 1
    """Uncached, one step in so many is run and the time multiplied."""
    result: torch.Tensor | None = None
    """The latents that the last loop ended with."""
    branch: str = "cond"
    step: int = 0
    latents: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.latents = next(iter(self.inputs.values())).pop("hidden_states")
        for each in self.inputs.values():
            each.pop("hidden_states", None)

    @property
    def branches(self) -> list[str]:
        """CFG branches."""
        return list(self.inputs)

    @property
    def module(self) -> nn.Module:
        """The first transformer."""
        return self.modules["transformer"]

    @property
    def num_blocks(self) -> int:
        """Blocks of one transformer."""
        names = ("transformer_blocks", "single_transformer_blocks", "blocks")
        return sum(len(getattr(self.module, name, ())) for name in names)

    def split(self, steps: int) -> dict[str, tuple[int, int]]:
        """First step and number of steps of each transformer."""
        if len(self.modules) == 1:
            return {"transformer": (0, steps)}
        half = steps // 2
        return {"transformer": (0, half), "transformer_2": (half, steps - half)}

    def warm(self) -> None:
        """Two steps untimed; where a step takes long, on a corner of the latents."""
        self.loop(2, self.latents if self.scale == 1 else self.latents[..., :16, :16])

    @torch.no_grad()
    def loop(self, steps: int, latents: torch.Tensor | None = None) -> float:
        """Denoise; seconds."""
        parts = self.split(steps)
        latents = (self.latents if latents is None else latents).clone()
        if latents.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for self.step in range(steps):
            name = next(n for n, (first, count) in parts.items() if first <= self.step < first + count)
            time_now = self.timestep(1.0 - self.step / steps).to(latents.device)
            outputs = []
            for branch, given in self.inputs.items():
                self.branch = branch
                outputs.append(self.modules[name](
                    hidden_states=latents, timestep=time_now, return_dict=False, **given
                )[0])
            velocity = outputs[0] if len(outputs) == 1 else outputs[1] + 4.0 * (outputs[0] - outputs[1])
            latents = latents - velocity / steps
        if latents.is_cuda:
            torch.cuda.synchronize()
        self.result = latents
        return time.perf_counter() - started


def _make(kind: type[nn.Module], config: dict[str, Any]) -> nn.Module:
    cuda = torch.cuda.is_available()
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
    try:
        with torch.device("cuda" if cuda else "cpu"):
            return kind(**config).eval()
    finally:
        torch.set_default_dtype(previous)


def _random(*shape: int) -> torch.Tensor:
    cuda = torch.cuda.is_available()
    return torch.randn(shape, device="cuda" if cuda else "cpu", dtype=torch.bfloat16 if cuda else torch.float32)


def _flux(tiny: bool, side: int, branches: int, **layers: int) -> Work:
    config: dict[str, Any] = {"guidance_embeds": True, **layers}
    tokens, text, dims = side * side, 512, (4096, 768)
    if tiny:
        config |= {
            "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6),
        }
        tokens, text, dims = 64, 8, (16, 16)
    module = _make(FluxTransformer2DModel, config)
    device = next(module.parameters()).device

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": _random(1, tokens, 64), "encoder_hidden_states": _random(1, text, dims[0]),
            "pooled_projections": _random(1, dims[1]), "guidance": torch.full((1,), 3.5, device=device),
            "img_ids": torch.zeros(tokens, 3, device=device), "txt_ids": torch.zeros(text, 3, device=device),
        }

    return Work(
        {"transformer": module}, {name: inputs() for name in ("cond", "uncond")[:branches]},
        steps=8 if tiny else 28, repeats=3, timestep=lambda t: torch.tensor([t]),
    )


def _qwen(tiny: bool) -> Work:
    config: dict[str, Any] = {}
    side, text, dim = 83, 256, 3584
    if tiny:
        config = {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16,
                  "axes_dims_rope": (4, 6, 6)}
        side, text, dim = 6, 8, 16
    module = _make(QwenImageTransformer2DModel, config)
    device = next(module.parameters()).device

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": _random(1, side * side, 64), "encoder_hidden_states": _random(1, text, dim),
            "encoder_hidden_states_mask": torch.ones(1, text, dtype=torch.bool, device=device),
            "img_shapes": [[(1, side, side)]],
        }

    return Work(
        {"transformer": module}, {name: inputs() for name in ("cond", "uncond")},
        steps=8 if tiny else 20, repeats=2, timestep=lambda t: torch.tensor([t]),
    )


def _wan(tiny: bool, height: int, width: int, steps: int, scale: int = 2) -> Work:
    config: dict[str, Any] = {}
    shape, text, dim = (1, 16, 21, height // 8, width // 8), 512, 4096
    if tiny:
        config = {"num_layers": 3, "attention_head_dim": 12, "num_attention_heads": 2, "text_dim": 16, "ffn_dim": 32,
                  "freq_dim": 16}
        shape, text, dim = (1, 16, 2, 16, 16), 8, 16
    modules = {name: _make(WanTransformer3DModel, config) for name in ("transformer", "transformer_2")}
    given = {"hidden_states": _random(*shape), "encoder_hidden_states": _random(1, text, dim)}
    return Work(modules, {"cond": given}, steps=steps, repeats=1, scale=scale,
                timestep=lambda t: torch.tensor([1000 * t]).long())


def build(name: str, tiny: bool) -> Work:
    """A model by name: flux1024, flux1024cfg, flux512, fluxpart, qwen1328, wan480, wan720.

    ``fluxpart`` has FLUX's widths and 16 of its 57 blocks.
    """
    return {
        "flux1024": lambda: _flux(tiny, 64, 1),
        "flux1024cfg": lambda: _flux(tiny, 64, 2),
        "flux512": lambda: _flux(tiny, 32, 1),
        "qwen1328": lambda: _qwen(tiny),
        "wan480": lambda: _wan(tiny, 480, 832, 16),
        "wan720": lambda: _wan(tiny, 720, 1280, 8, scale=4),
        "fluxpart": lambda: _flux(tiny, 64, 1, num_layers=2 if tiny else 4, num_single_layers=2 if tiny else 12),
    }[name]()
