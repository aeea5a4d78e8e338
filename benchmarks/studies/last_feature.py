"""Is the last layer's feature a better thing to forecast than the output? ``python -m benchmarks.studies.last_feature``

On the demo model, in a diffusers loop on the CPU, with the schedules of ``configs/tuned-demo.yaml``: cached steps
extrapolate linearly through the last two computed steps, either the transformer's output or what goes into its last
norm (then the norm and the projection run on cached steps too). Printed is the PSNR of the final latents against the
uncached ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import FluxPipeline

from sglang_cachedit_plugin import demo
from sglang_cachedit_plugin.cache.forecast import damped_weights
from sglang_cachedit_plugin.evaluation import quality

ROOT = Path(__file__).parents[2]
KINDS = ("output", "feature")


class Forecasting:
    """In place of the transformer's ``forward``: computes the steps of ``mask`` and forecasts the others."""

    def __init__(self, transformer: Any):
        self._transformer, self._own = transformer, transformer.forward
        self._feature = torch.empty(0)
        transformer.norm_out.register_forward_pre_hook(self._keep)
        self.begin("", "output")

    def begin(self, mask: str, kind: str) -> None:
        """The next picture; an empty mask computes every step."""
        self._mask, self._kind, self._step = mask, kind, 0
        self._places: list[float] = []
        self._known: list[torch.Tensor] = []

    def _keep(self, _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self._feature = inputs[0].float()

    def __call__(self, *inputs: Any, timestep: torch.Tensor, **more: Any) -> tuple[torch.Tensor]:
        """(batch, tokens, channels) in a tuple, as the transformer without ``return_dict``."""
        step, place = self._step, float(timestep.flatten()[0])
        self._step += 1
        if not self._mask or self._mask[step] == "1":
            output = self._own(*inputs, timestep=timestep, **more)
            self._places.append(place)
            self._known.append(output[0].float() if self._kind == "output" else self._feature)
            return output
        weights = damped_weights(self._places[-2:], place, 1.0)
        forecast = sum(weight * each for weight, each in zip(weights, self._known[-2:], strict=True))
        forecast = forecast.to(self._transformer.dtype)
        if self._kind == "output":
            return (forecast,)
        scaled = [1000 * each.to(forecast.dtype) for each in (timestep, more["guidance"])]
        time = self._transformer.time_text_embed(*scaled, more["pooled_projections"])
        return (self._transformer.proj_out(self._transformer.norm_out(forecast, time)),)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.last_feature", description=__doc__)
    parser.add_argument("--limit", type=int, default=8, help="tuning prompts")
    limit = parser.parse_args().limit
    folder = Path(demo.__file__).parent
    pipeline = FluxPipeline.from_pretrained(folder / "FLUX.1-dev", torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    forecasting = Forecasting(pipeline.transformer)
    pipeline.transformer.forward = forecasting
    profiles = yaml.safe_load((ROOT / "configs/tuned-demo.yaml").read_text())["profiles"]
    masks = {name: profile["schedules"][0]["mask"] for name, profile in profiles.items()}

    def draw(prompt: str, seed: int, mask: str, kind: str) -> np.ndarray:
        forecasting.begin(mask, kind)
        return pipeline(
            prompt, height=128, width=128, num_inference_steps=28, generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images.float().numpy()

    found: dict[tuple[str, str], list[float]] = {(name, kind): [] for name in masks for kind in KINDS}
    prompts = (folder / "prompts/tune.txt").read_text(encoding="utf-8").split("\n")[:limit]
    with torch.no_grad():
        for seed, prompt in enumerate(prompts):
            uncached = draw(prompt, seed, "", "output")
            for (name, kind), values in found.items():
                values.append(quality.latent_psnr(uncached, draw(prompt, seed, masks[name], kind)))
    for (name, kind), values in found.items():
        print(f"{name}, {masks[name].count('1')} computed, {kind}: {np.mean(values):.2f} dB, worst {min(values):.2f}")


if __name__ == "__main__":
    main()
