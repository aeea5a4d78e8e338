"""What two ranks do; results are checked in test_ranks.py."""

from __future__ import annotations

import random
from contextlib import nullcontext
from unittest import mock

import torch
import torch.distributed as dist

from sglang_cachedit_plugin.cache import cached_model, rank_agreement
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.errors import MountError
from sglang_cachedit_plugin.cache.cached_model import CachedModel
from sglang_cachedit_plugin.cache.spec import Groups
from sglang_cachedit_plugin.integration.request import Facts, Session
from sglang_cachedit_plugin.cache.similarity import reduced_differences, residual_difference, residual_sums
from tests.unit.blocks import Rig, TinyDiT, sample

from tests.dist import steps
from tests.dist.histories import histories
from tests.dist.world import collectives


def _world() -> dist.ProcessGroup:
    return dist.group.WORLD


def _reduced(reference: torch.Tensor, current: torch.Tensor) -> float:
    (diff,), _ = reduced_differences(residual_sums(reference, current), _world(), device=reference.device)
    return diff


def random_shards(rank: int) -> list[tuple[float, float, float]]:
    """(value over shards, value of the whole, mean of the shards' values) of random tensors cut at random."""
    draw, rows = random.Random(5), []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        tokens, scale = draw.randint(1, 40), draw.choice([1e-3, 1.0, 200.0])
        shape = (draw.randint(1, 2), tokens, draw.randint(1, 24))
        dtype = draw.choice([torch.float32, torch.bfloat16])
        cut = draw.randint(0, tokens)
        reference, current = (
            (scale * torch.randn(shape, generator=generator)).to(dtype) for _ in range(2)
        )
        parts = [(reference[:, :cut], current[:, :cut]), (reference[:, cut:], current[:, cut:])]
        whole = residual_difference(reference, current)
        alone = [residual_difference(*part) for part in parts]
        rows.append((_reduced(*parts[rank]), whole, sum(alone) / 2))
    return rows


def padded_shards(rank: int) -> list[tuple[float, float]]:
    """(value over padded shards, value of the whole) through a mounted model, whose blocks fill the padding."""
    rows = []
    for tokens in (5, 7, 9):
        groups = Groups(forward=_world(), sp_rank=rank, sp_ranks=2, tokens=tokens)
        whole, cut = Rig().begin(2, residual_diff_threshold=0.9), Rig()
        cut.begin(2, groups=groups, residual_diff_threshold=0.9)
        for step in range(2):
            values = torch.randn(1, tokens, 8, generator=torch.Generator().manual_seed(tokens))
            values = values + 0.2 * step * torch.randn(1, tokens, 8, generator=torch.Generator().manual_seed(1))
            whole.run("cond", step, values)
            padding = torch.full((1, tokens % 2, 8), 3.0 * (step + 1))
            cut.run("cond", step, torch.cat([values, padding], dim=1).chunk(2, dim=1)[rank])
        rows.append((cut.stats.branches["cond"].residual_diffs[1], whole.stats.branches["cond"].residual_diffs[1]))
    return rows


def nan_on_one_rank(rank: int) -> dict:
    """Decisions where one rank's input is NaN at one step."""
    rig = Rig().begin(6, groups=Groups(forward=_world()), residual_diff_threshold=0.9)
    for step in range(6):
        value = sample("cond", step)
        if rank == 1 and step == 3:
            value = value * float("nan")
        rig.run("cond", step, value)
    return rig.stats.branches["cond"].as_dict()


def another_shape_on_one_rank(rank: int) -> dict:
    """A longer sequence from step 3 on, whose additional tokens all fall to rank 1."""
    rig = Rig().begin(7, groups=Groups(forward=_world()), residual_diff_threshold=0.9)
    for step in range(7):
        value = sample("cond", step)
        rig.run("cond", step, torch.cat([value, value], dim=1) if rank == 1 and step >= 3 else value)
    return rig.stats.branches["cond"].as_dict()


def unlike_shards(rank: int) -> dict:
    """Each rank's own difference would decide otherwise on some steps."""
    def run(groups: Groups) -> dict:
        rig = Rig().begin(10, groups=groups, residual_diff_threshold=0.25, max_continuous_cached_steps=-1)
        for step in range(10):
            rig.run("cond", step, sample("cond", step, scale=(0.02, 0.2)[rank]))
        return rig.stats.branches["cond"].as_dict()

    return {"together": run(Groups(forward=_world())), "alone": run(Groups())}


def _looked_at(groups: Groups) -> Rig:
    """A model whose blocks were looked at in an earlier request; that exchanges what was found."""
    rig = Rig().begin(1, groups=groups)
    rig.run("cond", 0)
    return rig


COUNTED = {
    "static": {"steps_computation_mask": (1, 0, 1, 0, 0, 0), "steps_computation_policy": "static"},
    "static output": {
        "steps_computation_mask": (1, 1, 1, 0, 0, 0), "steps_computation_policy": "static", "forecast": "output",
    },
    "warmup": {"max_warmup_steps": 6},
    "capped": {"max_cached_steps": 0},
    "capped in a row": {"max_continuous_cached_steps": 0},
    "never": {"residual_diff_threshold": 0.0},
    "always": {"residual_diff_threshold": 1.0},
    "measured": {"residual_diff_threshold": 0.9},
    "measured, two in a row": {"residual_diff_threshold": 0.9, "max_continuous_cached_steps": 2},
}


def counted_collectives(rank: int) -> dict[str, tuple[dict[str, int], int]]:
    """(collectives, measured differences) of six steps with each of COUNTED's settings."""
    found = {}
    for name, knobs in COUNTED.items():
        rig = _looked_at(Groups(forward=_world())).begin(6, groups=Groups(forward=_world()), **knobs)
        with collectives() as counts:
            for step in range(6):
                rig.run("cond", step)
        found[name] = (dict(counts), len(rig.stats.branches["cond"].residual_diffs))
    return found


def _pair(rank: int, alone: bool = False) -> Groups:
    """One CFG branch a rank."""
    return Groups(cfg_group=_world(), cfg_rank=rank, cfg_ranks=2) if not alone else Groups()


def _branches(rank: int, groups: Groups, steps: int = 12, **knobs: object) -> dict:
    """The report of this rank's branch; the second branch changes faster."""
    rig = Rig().begin(
        steps, groups=groups, residual_diff_threshold=0.3, max_continuous_cached_steps=-1, **knobs
    )
    for step in range(steps):
        rig.run(("cond", "uncond")[rank], step, sample("cond", step, scale=(0.05, 0.12)[rank]))
    return rig.stats.branches[("cond", "uncond")[rank]].as_dict()


def lockstep(rank: int) -> dict:
    """The same loops with and without."""
    with collectives() as counts:
        together = _branches(rank, _pair(rank), lockstep=True, verify_ranks=False)
    return {
        "on": together, "off": _branches(rank, _pair(rank)), "counts": dict(counts),
        "verified": _branches(rank, _pair(rank), lockstep=True, verify_ranks=True),
    }


def lockstep_with_uneven_branches(rank: int) -> dict:
    """Three branches on two ranks: one of them runs a second forward, alone."""
    rig = Rig().begin(8, groups=_pair(rank), lockstep=True, verify_ranks=True, residual_diff_threshold=0.3)
    for step in range(8):
        rig.run(("cond", "uncond")[rank], step)
        if rank == 0:
            rig.run("perturbed", step)
    return {name: branch.as_dict() for name, branch in rig.stats.branches.items()}


def lockstep_where_one_branch_is_lost(rank: int) -> dict:
    """Two forwards of the same branch and step on one rank cannot be told apart: both ranks compute."""
    rig = Rig().begin(8, groups=_pair(rank), lockstep=True, residual_diff_threshold=0.9)
    for step in range(8):
        rig.run(("cond", "uncond")[rank], step)
        if rank == 1 and step == 3:
            rig.run("uncond", step)
    return rig.stats.branches[("cond", "uncond")[rank]].as_dict()


def following_cond(rank: int) -> dict:
    """``cfg_diff_compute_separate: false`` over two ranks, and on one."""
    report = _branches(rank, _pair(rank), cfg_diff_compute_separate=False)
    alone = Rig().begin(
        12, residual_diff_threshold=0.3, max_continuous_cached_steps=-1, cfg_diff_compute_separate=False
    )
    for step in range(12):
        for index, branch in enumerate(("cond", "uncond")):
            alone.run(branch, step, sample("cond", step, scale=(0.05, 0.12)[index]))
    return {"pair": report, "alone": alone.stats.branches[("cond", "uncond")[rank]].as_dict()}


def _message(call) -> str:
    try:
        call()
    except rank_agreement.RanksDisagreeError as error:
        return str(error)
    return "agreed"


def different_decisions(rank: int) -> list[str]:
    """What each rank says when one caches and the other does not."""
    diff = (0.21, 0.27)[rank]
    return [
        _message(lambda: rank_agreement.verify(3, "cond", True, _world(), diff=0.2)),
        _message(lambda: rank_agreement.verify(4, "cond", rank == 0, _world(), diff=diff)),
        _message(lambda: rank_agreement.verify_same("settings", f"settings {rank}", _world())),
    ]


def verified_every_step(rank: int) -> dict[str, int]:
    """Comparisons in six steps, by schedule."""
    found = {}
    for name in ("static", "static output", "measured"):
        groups = Groups(forward=_world())
        rig = _looked_at(groups).begin(6, groups=groups, verify_ranks=True, **COUNTED[name])
        with collectives() as counts:
            for step in range(6):
                rig.run("cond", step)
        found[name] = counts["all_gather"]
    return found


def failure(rank: int) -> dict:
    """A block of one branch fails on rank 1; then the next request."""
    found = {}
    for name, knobs in {
        "apart": {}, "lockstep": {"lockstep": True}, "following": {"cfg_diff_compute_separate": False},
        "output": {"forecast": "output"}, "output in lockstep": {"forecast": "output", "lockstep": True},
    }.items():
        rig = Rig()
        rig.begin(8, groups=_pair(rank), verify_ranks=True, residual_diff_threshold=0.3, **knobs)
        error = None
        try:
            for step in range(8):
                rig.model.transformer_blocks[0].fail = rank == 1 and step == 5
                rig.run(("cond", "uncond")[rank], step)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        rig.model.transformer_blocks[0].fail = False
        rig.begin(8, groups=_pair(rank), verify_ranks=True, residual_diff_threshold=0.3, **knobs)
        for step in range(8):
            rig.run(("cond", "uncond")[rank], step)
        found[name] = {"error": error, "next": rig.stats.branches[("cond", "uncond")[rank]].as_dict()}
    return found


def fault_on_one_rank(rank: int) -> dict:
    """The first forward of one branch shows that its blocks are not as declared."""
    rig = Rig().begin(8, groups=_pair(rank), lockstep=True, residual_diff_threshold=0.9)
    if rank == 1:
        calls = iter([True])

        def fail_once(*_: object) -> None:
            if next(calls, False):
                raise RuntimeError("block failed")

        # The model's own forward, which is run then, goes through.
        rig.model.transformer_blocks[0].register_forward_pre_hook(fail_once)
    for step in range(8):
        rig.run(("cond", "uncond")[rank], step)
    return {"cached": rig.stats.branches[("cond", "uncond")[rank]].cached, "problem": rig.mounted.problem()}


def mount_on_one_rank(rank: int) -> tuple[bool, str | None, str]:
    """Whether a request is cached, why not, and how the model stands."""
    model = CachedModel({"transformer": TinyDiT()})
    facts = Facts(
        steps={"transformer": (0, 6)}, identify=lambda name, kwargs: None, groups=Groups(forward=_world())
    )
    session = Session("native", Defaults().decide(True, None))
    broken = mock.patch.object(cached_model, "CachedTransformer", side_effect=MountError("no such blocks"))
    with broken if rank == 1 else nullcontext():
        session.open(model, facts)
    return session.stats.enabled, session.stats.reason, model.state.name


def joint_decision(rank: int) -> dict:
    """One forward's halves on two ranks: one decision."""
    groups = Groups(forward=_world(), cfg_group=_world(), cfg_rank=rank, cfg_ranks=2)
    return {
        "together": _branches(rank, groups, verify_ranks=True),
        "failed": _joint_failure(rank, groups),
    }


def _joint_failure(rank: int, groups: Groups) -> str:
    rig = Rig().begin(4, groups=groups, verify_ranks=True, residual_diff_threshold=0.3)
    try:
        for step in range(4):
            rig.model.transformer_blocks[0].fail = rank == 1 and step == 2
            rig.run("cond", step)
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return "went through"


STATIC_STEPS = {
    "steps_computation_mask": (1, 1, 1, *(1, 0, 0) * 5, 1, 1), "steps_computation_policy": "static",
}


def _shards(rank: int) -> tuple[Groups, torch.Tensor]:
    return Groups(forward=_world(), sp_rank=rank, sp_ranks=2), steps.start().chunk(2, dim=1)[rank].clone()


def steps_on_shards(rank: int) -> dict:
    """Latents cut over two ranks against the whole on one."""
    groups, own = _shards(rank)
    return {
        "control": steps.controlled(groups, own), "whole control": steps.controlled(Groups(), steps.start()),
        "corrector": steps.cached(groups, own), "whole corrector": steps.cached(Groups(), steps.start()),
    }


def steps_on_replicas(rank: int) -> dict:
    """The same latents on both ranks, as under TP; outputs of one rank are off by rounding."""
    groups = Groups(forward=_world())
    return {
        "control": steps.controlled(groups, steps.start()), "corrector": steps.cached(groups, steps.start()),
        "rounding": steps.controlled(groups, steps.start(), noise=1e-6 * rank),
    }


def steps_of_branches(rank: int) -> dict:
    """One branch a rank."""
    return {
        "control": steps.controlled(_pair(rank), steps.start(), _world()),
        "alone": steps.cached(_pair(rank), steps.start(), _world()),
        "lockstep": steps.cached(_pair(rank), steps.start(), _world(), lockstep=True),
        "static": steps.cached(_pair(rank), steps.start(), _world(), **STATIC_STEPS),
    }


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        histories, random_shards, padded_shards, nan_on_one_rank, another_shape_on_one_rank, unlike_shards,
        counted_collectives,
        lockstep, lockstep_with_uneven_branches, lockstep_where_one_branch_is_lost, following_cond,
        different_decisions, verified_every_step, failure, fault_on_one_rank, mount_on_one_rank, joint_decision,
        steps_on_shards, steps_on_replicas, steps_of_branches,
    )
}
