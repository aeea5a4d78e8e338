"""Ranks of the host that share a forward or a decision, and their process groups.

As in ``sglang_api``, imports of sglang stand inside functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..cache.spec import Groups
from ..errors import HostContractError, MountError, Reason, SettingError

if TYPE_CHECKING:
    from ..cache.parallel import ParallelLayout

_ALL_RANKS = ("REPLICATED", "CFG_PARALLEL")
"""The host's kinds of stages in which every rank runs forwards of its own."""


def groups(
    known: Slices, stages: Sequence[Any], batch: Any, *, modules: Iterable[Any] = (), joint: bool = False,
    patch_size: Any = None,
) -> Groups:
    """Process groups of one request on the native backend.

    Args:
        known: this process's slices.
        modules: the transformers.
        patch_size: frames, rows and columns of latents that make a token, for latents that are not packed.
        stages: the stages under way, outermost first; where one runs on the main rank alone, or spreads one
            forward over the CFG ranks, branches are not computed side by side.
        joint: one decision covers the CFG ranks, because the stage says so.

    Raises:
        MountError: ranks that wait for one another in the transformer could not decide together.
    """
    import torch.distributed as dist
    from sglang.multimodal_gen.runtime.distributed import parallel_state as state

    from ..cache.parallel import weight_ranks

    if not known.cfg or not state.model_parallel_is_initialized():
        if dist.is_initialized() and dist.get_world_size() > 1:
            why = f"the layout of the {dist.get_world_size()} ranks is not known: each would decide alone"
            raise MountError(Reason("ranks", why))
        return Groups()
    weights = weight_ranks(modules)
    if not weights <= set(known.cfg):
        why = f"FSDP gathers the weights from {len(weights)} ranks, and {len(known.cfg)} of them serve the request"
        raise MountError(Reason("ranks", why))
    # A stage may run one forward over the CFG ranks: then the host's SP group is theirs for its duration.
    sp = state.get_sp_group()
    spread = not set(sp.ranks) <= set(known.model)
    shards = {"sp_rank": sp.rank_in_group, "sp_ranks": sp.world_size, "tokens": _tokens(batch, patch_size)}
    forward = known.groups.get(known.cfg if spread else known.model)
    cfg = state.get_cfg_group()
    side_by_side = cfg.world_size > 1 and all(
        stage.parallelism_type_for(batch).name in _ALL_RANKS for stage in stages
    )
    if spread or not side_by_side:
        if not spread and not weights <= set(known.model):
            why = f"FSDP gathers the weights from {len(weights)} ranks, not all of which run this stage"
            raise MountError(Reason("ranks", why))
        return Groups(forward=forward, **shards)
    cfg_group = known.groups.get(known.cfg)
    return Groups(
        forward=cfg_group if joint else forward, cfg_group=cfg_group, cfg_rank=cfg.rank_in_group,
        cfg_ranks=cfg.world_size, gathered=not weights <= set(known.model), **shards,
    )


def _tokens(batch: Any, patch_size: Any) -> int | None:
    """Tokens of the latents before the host cuts and pads them."""
    shape = getattr(batch, "raw_latent_shape", None)
    if shape is not None and len(shape) == 3:
        return int(shape[1])
    if shape is not None and len(shape) == 5 and isinstance(patch_size, tuple | list) and len(patch_size) == 3:
        return math.prod(int(length) // int(patch) for length, patch in zip(shape[2:], patch_size, strict=True))
    return None


@dataclass(frozen=True)
class Slices:
    """Ranks of this process's slices of the world, and the process groups of slices of several ranks.

    ``model`` is SP x TP, ``cfg`` is SP x TP x CFG; both lie within one data-parallel replica. Empty: not known.
    """

    model: tuple[int, ...] = ()
    cfg: tuple[int, ...] = ()
    groups: Mapping[tuple[int, ...], Any] = field(default_factory=dict)


def slices() -> Slices:
    """Find the ranks that must agree; make process groups where the host has none.

    Every rank calls this at the same time, once its model-parallel groups exist.

    Raises:
        HostContractError: pipeline parallelism, which SGLang Diffusion does not start with.
    """
    import torch.distributed as dist
    from sglang.multimodal_gen.runtime.distributed import parallel_state as state

    world = state.get_world_group()
    if world.world_size == 1:
        return Slices()
    if getattr(getattr(state, "_PP", None), "world_size", 1) > 1:
        raise HostContractError("the blocks of one transformer lie on several pipeline ranks: no group can decide")
    axes = {"sp": state.get_sp_group(), "tp": state.get_tp_group(), "cfg": state.get_cfg_group()}
    everyone: list[dict[str, list[int]]] = [{} for _ in range(world.world_size)]
    dist.all_gather_object(everyone, {name: list(axis.ranks) for name, axis in axes.items()}, group=world.cpu_group)
    known = {tuple(sorted(ranks)) for each in everyone for ranks in each.values()}
    groups = {tuple(sorted(axis.ranks)): axis.device_group for axis in axes.values() if axis.world_size > 1}
    own: list[tuple[int, ...]] = []
    for names in (("sp", "tp"), ("sp", "tp", "cfg")):
        for ranks in connected([each[name] for each in everyone for name in names]):
            members = tuple(ranks)
            if members not in known and len(members) > 1:
                known.add(members)
                # new_group is collective over the world: ranks outside it take part and keep nothing.
                group = dist.new_group(ranks)
                if dist.get_rank() in members:
                    groups[members] = group
            if dist.get_rank() in members:
                own.append(members)
    for members in dict.fromkeys(own):
        if members in groups:
            _connect(groups[members])
    return Slices(*own, groups)


def _connect(group: Any) -> None:
    """Open a group's connections now: with NCCL the first collective of each kind takes up to a third of a second.

    Decisions are reduced, ``verify_ranks`` gathers.
    """
    import torch
    import torch.distributed as dist

    if dist.get_backend(group) == "nccl":
        own = torch.zeros(1, device=torch.cuda.current_device())
        dist.all_reduce(own, group=group)
        dist.all_gather([torch.empty_like(own) for _ in range(dist.get_world_size(group))], own, group=group)


def layout() -> ParallelLayout:
    """Over how many ranks the host spreads one forward, by axis."""
    from sglang.multimodal_gen.runtime.distributed import parallel_state as state

    from ..cache.parallel import ParallelLayout

    if not state.model_parallel_is_initialized():
        return ParallelLayout()
    return ParallelLayout(
        ulysses_size=state.get_ulysses_parallel_world_size(),
        ring_size=state.get_ring_parallel_world_size(),
        tp_size=state.get_tp_world_size(),
    )


def ensure_one_replica(group: Any) -> None:
    """Refuse a mesh of ranks that serve different requests.

    Raises:
        SettingError: ``group`` reaches over data-parallel replicas.
    """
    import torch.distributed as dist
    from sglang.multimodal_gen.runtime.distributed import parallel_state as state

    if group is None or not state.model_parallel_is_initialized():
        return
    replica, ranks = set(state.get_replica_group().ranks), dist.get_process_group_ranks(group)
    if not set(ranks) <= replica:
        raise SettingError(
            "parallelism_config", f"{len(ranks)} ranks", "--cache-dit-config",
            f"at most the {len(replica)} ranks of one data-parallel replica",
        )


def connected(sets: list[list[int]]) -> list[list[int]]:
    """Connected components of overlapping rank lists, each sorted, in order of their first rank."""
    components: list[set[int]] = []
    for ranks in sets:
        joined = set(ranks)
        rest = []
        for component in components:
            if component & joined:
                joined |= component
            else:
                rest.append(component)
        components = [*rest, joined]
    return sorted(sorted(component) for component in components)
