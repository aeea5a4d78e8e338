"""Denoising loops on known outputs, at a real scheduler's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from sglang.multimodal_gen.runtime.models.schedulers import (
    scheduling_dpm_solver_multistep,
    scheduling_flow_match_euler_discrete,
    scheduling_flow_unipc_multistep,
    scheduling_unipc_multistep,
)

from sglang_cachedit_plugin.cache.denoising_steps import DenoisingSteps
from sglang_cachedit_plugin.cache.solvers import Solver
from sglang_cachedit_plugin.cache.spec import Groups
from sglang_cachedit_plugin.config.settings import CacheSettings
from sglang_cachedit_plugin.report.stats import RequestStats, TransformerStats

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "diffusers Euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "SGLang Euler": lambda: scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "diffusers UniPC": lambda: UniPCMultistepScheduler(**FLOW),
    "SGLang FlowUniPC": lambda: scheduling_flow_unipc_multistep.FlowUniPCMultistepScheduler(shift=3.0),
    "SGLang UniPC": lambda: scheduling_unipc_multistep.UniPCMultistepScheduler(**FLOW),
    "diffusers DPM-Solver++": lambda: DPMSolverMultistepScheduler(**FLOW),
    "SGLang DPM-Solver++": lambda: scheduling_dpm_solver_multistep.DPMSolverMultistepScheduler(**FLOW),
    "diffusers DEIS": lambda: DEISMultistepScheduler(**FLOW),
    "diffusers DDIM, v": lambda: DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
    "diffusers Euler, epsilon": lambda: EulerDiscreteScheduler(prediction_type="epsilon"),
}
"""Every scheduler whose steps are repeated."""
SHAPE = (2, 4, 6)


def noise(seed: int = 0) -> torch.Tensor:
    """Latents (batch, tokens, channels) at the beginning."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def scaled_input(scheduler: Any, latents: torch.Tensor, timestep: Any) -> torch.Tensor:
    """What the model is given."""
    scale = getattr(scheduler, "scale_model_input", None)
    return latents if scale is None else scale(latents, timestep)


class Loop:
    """A denoising loop of one branch.

    Args:
        output: model output at a step's number, position and latents.
        asked: the corrector was asked for, not only left on.
        settings: of the request.
    """

    def __init__(
        self, name: str, steps: int, output: Callable[[int, float, torch.Tensor], torch.Tensor], *, asked: bool = False,
        **settings: Any,
    ):
        self.scheduler = SCHEDULERS[name]()
        self.scheduler.set_timesteps(steps)
        self.stats = RequestStats(backend="test", enabled=True)
        self.stats.transformers["transformer"] = TransformerStats(steps=steps)
        self.solver = Solver(self.scheduler, self.scheduler.step)
        self.steps = DenoisingSteps(self.solver, CacheSettings(**settings), self.stats, Groups(), asked=asked)
        self._output, self.last = output, torch.empty(0)

    def run(
        self, mask: Sequence[int] | None = None, forecast: Callable[[int, float], torch.Tensor] | None = None, *,
        last: bool = True,
    ) -> torch.Tensor:
        """Latents at the end.

        Args:
            mask: 1 computed, 0 cached with the value of ``forecast``; None: as the error tolerance decides.
            last: no other loop of the same request follows.
        """
        latents = noise()
        with self.steps.in_place():
            for number, timestep in enumerate(self.scheduler.timesteps):
                place = self.solver.place(number)
                computed = bool(mask[number]) if mask is not None else self.steps.computes()
                scaled = scaled_input(self.scheduler, latents, timestep)
                if computed:
                    output = self.last = self._output(number, place.position, scaled)
                else:
                    output = self.steps.forecast() if forecast is None else forecast(number, place.position)
                self.stats.transformers["transformer"].branch("cond").record(number, not computed)
                latents = self.scheduler.step(output, timestep, latents, return_dict=False)[0]
        if last:
            self.steps.finish()
        return latents


def uncached(name: str, steps: int, output: Callable[[int, float, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Latents at the end of a loop on a fresh scheduler, which the plugin has not touched."""
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(steps)
    places = Solver(scheduler, scheduler.step)
    latents = noise()
    for number, timestep in enumerate(scheduler.timesteps):
        value = output(number, places.place(number).position, scaled_input(scheduler, latents, timestep))
        latents = scheduler.step(value, timestep, latents, return_dict=False)[0]
    return latents
