"""Denoising loops whose steps several ranks make together: the corrector and error control."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.distributed import distributed_c10d

from sglang_cachedit_plugin.cache.denoising_steps import DenoisingSteps
from sglang_cachedit_plugin.cache.solvers import Solver
from sglang_cachedit_plugin.cache.spec import Groups
from sglang_cachedit_plugin.config.settings import CacheSettings
from sglang_cachedit_plugin.report.stats import RequestStats, TransformerStats
from tests.unit.blocks import DIM, Rig

from tests.dist.world import collectives

STEPS, GUIDANCE = 20, 2.0
BRANCHES = ("cond", "uncond")
WEIGHT = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(9)) / DIM**0.5


def start(tokens: int = 12) -> torch.Tensor:
    """The whole latents (2 prompts, tokens, channels); the second prompt is the harder one."""
    return torch.randn(2, tokens, DIM, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 2.0])[:, None, None]


def output(latents: torch.Tensor, branch: str, sigma: float) -> torch.Tensor:
    """A model output; tokens do not see one another, so that shards are parts of the whole."""
    turn = 2.0 if branch == "cond" else 5.0
    return torch.tanh(latents @ WEIGHT) * (1.0 + torch.sin(torch.tensor(turn * sigma))) - 0.5 * latents


def guided(own: torch.Tensor, row: int, group: Any) -> torch.Tensor:
    """Both branches combined as the host does: each rank's share, summed over the CFG ranks."""
    share = own * (GUIDANCE, 1.0 - GUIDANCE)[row]
    # Not counted: the host's own collective.
    distributed_c10d.all_reduce(share, group=group)
    return share


class _Loop:
    def __init__(self, groups: Groups, settings: dict[str, Any]):
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.scheduler.set_timesteps(STEPS)
        self.stats = RequestStats(backend="test", enabled=True)
        self.solver = Solver(self.scheduler, self.scheduler.step)
        self.steps = DenoisingSteps(self.solver, CacheSettings(**settings), self.stats, groups, asked=True)

    def run(self, latents: torch.Tensor, step) -> dict[str, Any]:
        with collectives() as counts, self.steps.in_place():
            for number, timestep in enumerate(self.scheduler.timesteps):
                value = step(number, self.solver.place(number).position, latents)
                latents = self.scheduler.step(value, timestep, latents, return_dict=False)[0]
        self.steps.finish()
        transformer = self.stats.transformers["transformer"]
        return {
            "latents": latents, "counts": dict(counts), "corrected": self.stats.corrector.corrected_steps,
            "branches": {name: branch.as_dict() for name, branch in transformer.branches.items()},
        }


def controlled(
    groups: Groups, latents: torch.Tensor, cfg: Any = None, tolerance: float = 0.05, noise: float = 0.0
) -> dict[str, Any]:
    """A loop under an error tolerance.

    Args:
        cfg: the CFG ranks, of which each runs its branch; None: this rank runs both.
        noise: what this rank's outputs are off, as those of other kernels are.
    """
    loop = _Loop(groups, {"error_tolerance": tolerance})
    loop.stats.transformers["transformer"] = TransformerStats(steps=STEPS)

    def step(number: int, sigma: float, latents: torch.Tensor) -> torch.Tensor:
        def compute() -> torch.Tensor:
            if cfg is not None:
                return guided(output(latents, BRANCHES[groups.cfg_rank], sigma), groups.cfg_rank, cfg) * (1.0 + noise)
            both = [output(latents, branch, sigma) for branch in BRANCHES]
            return (GUIDANCE * both[0] + (1.0 - GUIDANCE) * both[1]) * (1.0 + noise)

        return loop.steps.predict("transformer", BRANCHES, compute)

    return loop.run(latents, step)


def cached(groups: Groups, latents: torch.Tensor, cfg: Any = None, **knobs: Any) -> dict[str, Any]:
    """A loop over a mounted model whose blocks decide or follow a schedule, with the corrector.

    Args:
        cfg: as for ``controlled``; None: no guidance.
    """
    rig = Rig().begin(1, groups=groups)
    rig.run("cond", 0, latents)
    rig.begin(STEPS, groups=groups, verify_ranks=False, **{"residual_diff_threshold": 0.2, **knobs})
    loop = _Loop(groups, {})
    loop.stats.transformers["transformer"] = rig.stats
    loop.steps.spec = rig.mounted.request

    def step(number: int, sigma: float, latents: torch.Tensor) -> torch.Tensor:
        branch = "cond" if cfg is None else BRANCHES[groups.cfg_rank]
        # The second branch changes faster.
        own = rig.run(branch, number, latents * (1.0 if branch == "cond" else 0.3 + sigma)) - latents
        return own if cfg is None else guided(own, groups.cfg_rank, cfg)

    return loop.run(latents, step)
