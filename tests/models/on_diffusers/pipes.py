"""What real pipelines of diffusers around the tiny transformers are made of."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch

from tests.models.on_diffusers import images, videos

TEXT, WIDTH = 3, 16
NO_PROMPT = {"negative_prompt": None, "use_resolution_binning": False}
CASES = {**images.CASES, **videos.CASES}


@dataclass(frozen=True, kw_only=True)
class PipeCase:
    """One pipeline.

    Args:
        build: makes it, untouched by the plugin.
        call: (side of the picture, 4 or 8 latent pixels) -> arguments.
        branches: what the report must call its branches.
        experts: steps that each of two transformers takes, by their boundary.
        first: index of the first of the scheduler's steps that it runs.
    """

    build: Callable[[], Any]
    call: Callable[[int], dict[str, Any]]
    branches: tuple[str, ...]
    experts: tuple[int, ...] = ()
    first: int = 0

    @property
    def transformer(self) -> str:
        """Class of its transformer."""
        return self.build.args[1]

    def schedule(self, computed: list[int], cached: list[int]) -> dict[str, dict[str, tuple[list[int], list[int]]]]:
        """What the report must say of these of the scheduler's steps: (computed, cached) by transformer and branch."""
        computed, cached = ([step - self.first for step in steps if step >= self.first] for steps in (computed, cached))
        bounds, names = [0, *self.experts], ("transformer", "transformer_2")
        if not self.experts:
            return {"transformer": {branch: (computed, cached) for branch in self.branches}}
        spans = [range(start, start + count) for start, count in zip(bounds, self.experts, strict=False)]
        return {
            name: {
                branch: ([s for s in computed if s in span], [s for s in cached if s in span])
                for branch in self.branches
            }
            for name, span in zip(names, spans, strict=True)
        }


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def embeds(seed: int = 0) -> torch.Tensor:
    return noise(seed, 1, TEXT, WIDTH)


def pair(mask: str = "prompt_attention_mask", kind: Any = torch.long) -> dict[str, Any]:
    both = {"prompt_embeds": embeds(1), "negative_prompt_embeds": embeds(2)}
    if mask:
        both |= {name: torch.ones(1, TEXT, dtype=kind) for name in (mask, f"negative_{mask}")}
    return both


def two_pairs(mask: str = "prompt_attention_mask") -> dict[str, Any]:
    """Embeddings of two text encoders."""
    return {**pair(mask), **{f"{name}_2": value for name, value in pair(mask).items()}}


def pooled(width: int = WIDTH) -> dict[str, Any]:
    return {"pooled_prompt_embeds": noise(3, 1, width), "negative_pooled_prompt_embeds": noise(4, 1, width)}


def vae(channels: int) -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=channels, norm_num_groups=1,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0,
    ).eval()


def wan_vae() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()


def euler(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def _build(
    name: str, transformer: str, components: dict[str, Any], config: dict[str, Any], after: Callable[[Any], None] | None
) -> Any:
    cls = getattr(diffusers, name)
    given = {key: value() if callable(value) else value for key, value in components.items()}
    case = CASES[transformer]
    given["transformer"] = replace(case, config={**case.config, **config}).build(transformer)
    for key, parameter in inspect.signature(cls.__init__).parameters.items():
        if key != "self" and parameter.default is parameter.empty:
            given.setdefault(key, None)
    if "controlnet" in given:
        given["controlnet"] = given["controlnet"](given["transformer"])
    made = cls(**given)
    made.set_progress_bar_config(disable=True)
    if after is not None:
        after(made)
    return made


def pipe(
    name: str, transformer: str, *, config: dict[str, Any] | None = None, after: Callable[[Any], None] | None = None,
    **components: Any,
) -> Callable[[], Any]:
    """A pipeline with a tiny transformer; what ``__init__`` wants beyond ``components`` is None.

    Args:
        config: other constructor arguments of the transformer than its own case has.
        after: does the rest to the pipeline.
    """
    return functools.partial(_build, name, transformer, components, config or {}, after)


def square(side: int, scale: int) -> dict[str, int]:
    return {"height": side * scale, "width": side * scale}


def picture(side: int) -> torch.Tensor:
    return noise(6, 1, 3, side, side).clamp(-1, 1)
