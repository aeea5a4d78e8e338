"""What four ranks do in the host's own layouts; results are checked in test_layouts.py."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from sglang.multimodal_gen.runtime.distributed import parallel_state as state
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import StageParallelismType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from sglang_cachedit_plugin.integration import ranks, request
from sglang_cachedit_plugin.integration.request import WORKER
from sglang_cachedit_plugin.cache import parallel
from sglang_cachedit_plugin.errors import MountError
from sglang_cachedit_plugin.cache.spec import Groups
from tests.unit.blocks import Rig, sample

from tests.dist import steps
from tests.dist.histories import histories
from tests.dist.world import collectives

LAYOUTS: dict[str, dict[str, int]] = {
    "Ulysses 4": {"sequence_parallel_degree": 4, "ulysses_degree": 4},
    "Ulysses 2 x ring 2": {"sequence_parallel_degree": 4, "ulysses_degree": 2, "ring_degree": 2},
    "TP 4": {"tensor_parallel_degree": 4, "sequence_parallel_degree": 1},
    "TP 2 x SP 2": {"tensor_parallel_degree": 2, "sequence_parallel_degree": 2, "ulysses_degree": 2},
    "CFG 2 x SP 2": {"classifier_free_guidance_degree": 2, "sequence_parallel_degree": 2, "ulysses_degree": 2},
    "CFG 2 x TP 2": {
        "classifier_free_guidance_degree": 2, "tensor_parallel_degree": 2, "sequence_parallel_degree": 1,
    },
    "replicas 2 x SP 2": {"data_parallel_size": 2, "sequence_parallel_degree": 2, "ulysses_degree": 2},
    "replicas 2 x TP 2": {"data_parallel_size": 2, "tensor_parallel_degree": 2, "sequence_parallel_degree": 1},
    "replicas 2 x CFG 2": {
        "data_parallel_size": 2, "classifier_free_guidance_degree": 2, "sequence_parallel_degree": 1,
    },
    "replicas 4": {"data_parallel_size": 4, "sequence_parallel_degree": 1},
}


def _stage(kind: str = "REPLICATED") -> Any:
    return SimpleNamespace(parallelism_type_for=lambda batch: StageParallelismType[kind])


@contextlib.contextmanager
def _layout(name: str):
    if state._WORLD is None:
        state.init_distributed_environment(
            world_size=dist.get_world_size(), rank=dist.get_rank(), local_rank=dist.get_rank(), backend="gloo"
        )
    state.initialize_model_parallel(**LAYOUTS[name], backend="gloo")
    request.groups_ready()
    try:
        yield
    finally:
        state.destroy_model_parallel()


def _ranks(group: Any) -> list[int]:
    return [] if group is None else dist.get_process_group_ranks(group)


def _named(groups: Groups) -> dict[str, Any]:
    return {
        "forward": _ranks(groups.forward), "cfg_group": _ranks(groups.cfg_group),
        "cfg_rank": (groups.cfg_rank, groups.cfg_ranks), "sp_rank": (groups.sp_rank, groups.sp_ranks),
    }


def _run(groups: Groups, value, steps: int = 8, **knobs: Any) -> dict:
    rig = Rig().begin(steps, groups=groups, residual_diff_threshold=0.3, max_continuous_cached_steps=-1, **knobs)
    for step in range(steps):
        rig.run("cond", step, value(step))
    return rig.stats.branches["cond"].as_dict()


def _whole(step: int) -> torch.Tensor:
    return torch.cat([sample(f"part {part}", step, scale=0.05 * part) for part in range(1, 5)], dim=1)


def every_layout(rank: int) -> dict[str, dict[str, Any]]:
    """Groups, and the decisions over them where the sequence is cut as the layout cuts it."""
    found = {}
    batch = SimpleNamespace(raw_latent_shape=(1, 20, 8))
    for name in LAYOUTS:
        with _layout(name):
            groups = ranks.groups(WORKER.slices, [_stage()], batch)
            cut = _run(
                groups, lambda step, g=groups: _whole(step).chunk(g.sp_ranks, dim=1)[g.sp_rank], verify_ranks=True
            )
            found[name] = _named(groups) | {
                "joint": _named(ranks.groups(WORKER.slices, [_stage()], batch, joint=True)),
                "main rank": _named(ranks.groups(WORKER.slices, [_stage("MAIN_RANK_ONLY"), _stage()], batch)),
                "layout": ranks.layout().strify(),
                "report": cut,
            }
    found["whole"] = _run(Groups(), _whole)
    return found


def one_forward_over_cfg_ranks(rank: int) -> dict[str, dict[str, Any]]:
    """A stage without guidance that the host spreads over the CFG ranks as one sequence."""
    found = {}
    for name in ("replicas 2 x CFG 2", "CFG 2 x TP 2"):
        with _layout(name), state.use_sequence_parallel_group(state.get_cfg_sequence_parallel_group()):
            stage = _stage("SEQUENCE_PARALLEL_OVER_CFG_RANKS")
            found[name] = _named(ranks.groups(WORKER.slices, [stage], SimpleNamespace()))
    return found


def idle_replica(rank: int) -> dict[str, Any]:
    """The first replica serves a request; the second one waits for nothing and nobody waits for it."""
    with _layout("replicas 2 x SP 2"):
        groups = ranks.groups(WORKER.slices, [_stage()], SimpleNamespace())
        if rank >= 2:
            return {"report": None, "collectives": 0}
        with collectives() as counts:
            report = _run(groups, lambda step: sample("cond", step, scale=(0.02, 0.2)[rank]), verify_ranks=True)
    return {"report": report, "collectives": sum(counts.values())}


def cfg_with_shards(rank: int) -> dict[str, Any]:
    """Two branches on two ranks each, in lockstep."""
    with _layout("CFG 2 x SP 2"):
        groups = ranks.groups(WORKER.slices, [_stage()], SimpleNamespace())
        branch = ("cond", "uncond")[groups.cfg_rank]
        found = {}
        for name in ("off", "on"):
            rig = Rig().begin(
                10, groups=groups, residual_diff_threshold=0.3, max_continuous_cached_steps=-1, verify_ranks=True,
                lockstep=name == "on",
            )
            for step in range(10):
                scales = ((0.02, 0.08), (0.05, 0.2))[groups.cfg_rank]
                whole = torch.cat([sample(branch, step, scale=each) for each in scales], 1)
                rig.run(branch, step, whole.chunk(2, dim=1)[groups.sp_rank])
            found[name] = rig.stats.branches[branch].as_dict()
    return found


def meshes(rank: int) -> dict[str, list[int]]:
    """Groups of transformers that cache-dit or diffusers spread, by the meshes they leave behind."""
    both = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("ring", "ulysses", "tp"))
    flat = both._flatten("all")
    context = init_device_mesh("cpu", (1, 4), mesh_dim_names=("ring", "ulysses"))._flatten("context")
    tensor = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "tensor"))["tensor"]

    def transformer(**attributes: Any) -> torch.nn.Module:
        model = torch.nn.Linear(4, 4)
        for name, value in attributes.items():
            setattr(model, name, value)
        return model

    sharded = transformer()
    sharded.weight = torch.nn.Parameter(distribute_tensor(sharded.weight.data, tensor, [Shard(0)]))
    config = SimpleNamespace(_flattened_mesh=context)
    found = {
        "none": transformer(),
        "three axes": transformer(
            _parallelism_config=SimpleNamespace(_flat_mesh=flat),
            _parallel_config=SimpleNamespace(context_parallel_config=SimpleNamespace(_flattened_mesh=tensor)),
        ),
        "context": transformer(
            _parallelism_config=SimpleNamespace(_flat_mesh=None),
            _parallel_config=SimpleNamespace(context_parallel_config=config),
        ),
        "tensor": sharded,
    }
    return {name: _ranks(parallel.mesh_group(model)) for name, model in found.items()}


def fsdp(rank: int) -> dict[str, Any]:
    """Groups of transformers whose weights are spread over all ranks, and over pairs of them."""
    def spread(*shape: int) -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        return fully_shard(model, mesh=mesh)

    found: dict[str, Any] = {}
    batch = SimpleNamespace()
    with _layout("CFG 2 x SP 2"):
        for name, shape in {"over the branches": (1, 4), "within a branch": (2, 2)}.items():
            model = spread(*shape)
            groups = ranks.groups(WORKER.slices, [_stage()], batch, modules=[model])
            found[name] = {"gathered": groups.gathered, "weights": sorted(parallel.weight_ranks([model]))}
    with _layout("replicas 2 x SP 2"):
        found["over replicas"] = _declined(modules=[spread(1, 4)])
    return found


def _declined(**arguments: Any) -> str:
    try:
        ranks.groups(WORKER.slices, [_stage()], SimpleNamespace(), **arguments)
    except MountError as error:
        return str(error)
    return "served"


def unknown_layout(rank: int) -> str:
    """The host's groups were made where the plugin did not see it."""
    with _layout("replicas 2 x SP 2"):
        WORKER.slices = ranks.Slices()
        return _declined()


def mesh_over_replicas(rank: int) -> list[str]:
    """A mesh of all ranks where each replica has two."""
    messages = []
    with _layout("replicas 2 x SP 2"):
        for group in (dist.group.WORLD, state.get_sp_group().device_group, None):
            try:
                ranks.ensure_one_replica(group)
                messages.append("")
            except ValueError as error:
                messages.append(str(error))
    return messages


def steps_of_branches_with_shards(rank: int) -> dict[str, Any]:
    """Two branches on two ranks each, latents cut over the two."""
    with _layout("CFG 2 x SP 2"):
        groups, cfg = ranks.groups(WORKER.slices, [_stage()], SimpleNamespace()), state.get_cfg_group().device_group
        own = steps.start().chunk(2, dim=1)[groups.sp_rank].clone()
        return {
            "sp_rank": groups.sp_rank,
            "control": steps.controlled(groups, own, cfg), "alone": steps.cached(groups, own, cfg),
        }


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        histories, every_layout, one_forward_over_cfg_ranks, idle_replica, cfg_with_shards, meshes, fsdp, unknown_layout,
        mesh_over_replicas, steps_of_branches_with_shards,
    )
}
