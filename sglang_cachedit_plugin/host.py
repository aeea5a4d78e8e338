"""Everything that is asked of SGLang: identity of a forward, groups of ranks, versions.

The only importer of sglang. Imports stand inside functions: the plugin is loaded in processes that must not
import the runtime early.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import HostContractError, SettingError
from .preflight import Machine
from .runtime import Groups, Identity
from .stats import COND

if TYPE_CHECKING:
    from .parallel import ParallelLayout

SUPPORTED_HOSTS = ("0.5.21", "0.5.22", "0.5.23")
_BRANCH_NAMES = {"conditional": COND, "unconditional": "uncond"}

_branch_name: str | None = None

_ALL_RANKS = ("REPLICATED", "CFG_PARALLEL")
"""The host's kinds of stages in which every rank runs forwards of its own."""


def version(distribution: str) -> str | None:
    """Installed version, None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def known_variables() -> Collection[str]:
    """Environment variables that the installed host reads."""
    from sglang.multimodal_gen import envs

    return envs.environment_variables.keys()


def machine() -> Machine:
    """Devices and libraries, without starting work on a device."""
    from sglang.multimodal_gen.runtime.platforms import current_platform

    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    return Machine(
        device=current_platform.device_type,
        capability=None if capability is None else (capability.major, capability.minor),
        cache_dit=version("cache-dit") or "",
    )


def transformer_classes(model_path: str) -> set[str]:
    """Classes of the transformers of a model in diffusers format; empty where its index is not on this machine."""
    index = Path(model_path) / "model_index.json"
    if not index.is_file():
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(model_path, "model_index.json")
        except ValueError:
            return set()
        if not isinstance(cached, str):
            return set()
        index = Path(cached)
    try:
        components = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    found = (components.get(name) for name in ("transformer", "transformer_2")) if isinstance(components, dict) else ()
    return {each[1] for each in found if isinstance(each, list) and len(each) == 2 and isinstance(each[1], str)}


def explicit_flags(server_args: Any) -> dict[str, Any]:
    """Server arguments that were given, not worked out by the host."""
    names = (
        "ulysses_degree", "ring_degree", "sp_degree", "tp_size", "dp_size", "kv_gather_degree", "attention_backend",
    )
    return {
        name: value
        for name in names
        if server_args.is_arg_explicitly_set(name) and (value := getattr(server_args, name)) is not None
    }


def forget_branch() -> None:
    """No branch was named for what comes next."""
    global _branch_name
    _branch_name = None


def forward_identity() -> Identity | None:
    """Branch and step of the forward under way, None outside the host's denoising loop."""
    from sglang.multimodal_gen.runtime.managers.forward_context import get_forward_context_or_none

    context = get_forward_context_or_none()
    if context is None or context.forward_batch is None:
        return None
    negative = bool(getattr(context.forward_batch, "is_cfg_negative", False))
    name = "uncond" if negative else COND
    named = _BRANCH_NAMES.get(_branch_name, _branch_name)
    if named is not None and named not in (COND, "uncond"):
        name = named
    return Identity(branch=name, step=int(context.current_timestep))


def forward_step() -> int | None:
    """Step of the forward under way, None outside the host's denoising loops."""
    from sglang.multimodal_gen.runtime.managers.forward_context import get_forward_context_or_none

    context = get_forward_context_or_none()
    return None if context is None else int(context.current_timestep)


def groups(stages: Sequence[Any], batch: Any, *, joint: bool = False, patch_size: Any = None) -> Groups:
    """Process groups of one request on the native backend.

    Args:
        patch_size: frames, rows and columns of latents that make a token, for latents that are not packed.
        stages: the stages under way, outermost first; where one runs on the main rank alone, or spreads one
            forward over the CFG ranks, branches are not computed side by side.
        joint: one decision covers the CFG ranks, because the stage says so.
    """
    from sglang.multimodal_gen.runtime.distributed import parallel_state as state

    if not _layout.pair or not state.model_parallel_is_initialized():
        return Groups()
    # A stage may run one forward over the CFG ranks: then the host's SP group is theirs for its duration.
    sp = state.get_sp_group()
    spread = not set(sp.ranks) <= set(_layout.model)
    shards = {"shard": sp.rank_in_group, "shards": sp.world_size, "tokens": _tokens(batch, patch_size)}
    forward = _layout.group(_layout.pair if spread else _layout.model)
    cfg = state.get_cfg_group()
    side_by_side = cfg.world_size > 1 and all(
        stage.parallelism_type_for(batch).name in _ALL_RANKS for stage in stages
    )
    if spread or not side_by_side:
        return Groups(forward=forward, **shards)
    pair = _layout.group(_layout.pair)
    return Groups(
        forward=pair if joint else forward, pair=pair, row=cfg.rank_in_group, rows=cfg.world_size, **shards
    )


def _tokens(batch: Any, patch_size: Any) -> int | None:
    """Tokens of the latents before the host cuts and pads them."""
    shape = getattr(batch, "raw_latent_shape", None)
    if shape is not None and len(shape) == 3:
        return int(shape[1])
    if shape is not None and len(shape) == 5 and isinstance(patch_size, tuple | list) and len(patch_size) == 3:
        return math.prod(int(length) // int(patch) for length, patch in zip(shape[2:], patch_size, strict=True))
    return None


class _Layout:
    """Ranks of this process's slices of the world, and the process groups of slices.

    ``model`` is SP x TP, ``pair`` is SP x TP x CFG; both lie within one data-parallel replica.
    """

    def __init__(self) -> None:
        self.model: tuple[int, ...] = ()
        self.pair: tuple[int, ...] = ()
        self._groups: dict[tuple[int, ...], Any] = {}

    def group(self, ranks: tuple[int, ...]) -> Any:
        """The process group of a slice, None for a single rank."""
        return self._groups.get(ranks)

    def build(self, axes: dict[str, Any], control: Any) -> None:
        """Find the slices; make process groups where the host has none. Every rank calls this at the same time.

        Args:
            axes: the host's group of this rank along each axis: ``sp``, ``tp`` and ``cfg``.
            control: a process group of all ranks, for exchanging the axes.
        """
        import torch.distributed as dist

        own = {name: list(axis.ranks) for name, axis in axes.items()}
        everyone: list[dict[str, list[int]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, own, group=control)
        known = {tuple(sorted(ranks)) for each in everyone for ranks in each.values()}
        self._groups = {
            tuple(sorted(axis.ranks)): axis.device_group for axis in axes.values() if axis.world_size > 1
        }
        for kind, names in (("model", ("sp", "tp")), ("pair", ("sp", "tp", "cfg"))):
            for ranks in connected([each[name] for each in everyone for name in names]):
                members = tuple(ranks)
                if members not in known and len(members) > 1:
                    known.add(members)
                    # new_group is collective over the world: ranks outside it take part and keep nothing.
                    group = dist.new_group(ranks)
                    if dist.get_rank() in members:
                        self._groups[members] = group
                        _connect(group)
                if dist.get_rank() in members:
                    setattr(self, kind, members)


def _connect(group: Any) -> None:
    """Open a group's connections now: with NCCL the first collective takes a third of a second to do so."""
    import torch
    import torch.distributed as dist

    if dist.get_backend(group) == "nccl":
        dist.all_reduce(torch.zeros(1, device=torch.cuda.current_device()), group=group)


_layout = _Layout()


def build_slices() -> None:
    """Find the ranks that must agree. Every rank calls this once its model-parallel groups exist.

    Raises:
        HostContractError: pipeline parallelism, which SGLang Diffusion does not start with.
    """
    from sglang.multimodal_gen.runtime.distributed import parallel_state as state

    world = state.get_world_group()
    if world.world_size == 1:
        return
    if getattr(getattr(state, "_PP", None), "world_size", 1) > 1:
        raise HostContractError("the blocks of one transformer lie on several pipeline ranks: no group can decide")
    axes = {"sp": state.get_sp_group(), "tp": state.get_tp_group(), "cfg": state.get_cfg_group()}
    _layout.build(axes, world.cpu_group)


def layout() -> ParallelLayout:
    """Over how many ranks the host spreads one forward, by axis."""
    from sglang.multimodal_gen.runtime.distributed import parallel_state as state

    from .parallel import ParallelLayout

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


def size_of(batch: Any) -> tuple[int, ...] | None:
    """Width and height of a request's pictures, and frames of a video; None where it does not say."""
    width, height, frames = (getattr(batch, name, None) for name in ("width", "height", "num_frames"))
    if not all(isinstance(each, int) and each > 0 for each in (width, height)):
        return None
    return (width, height, frames) if isinstance(frames, int) and frames > 1 else (width, height)


def prefer_regional_compile(server_args: Any, module: Any) -> bool:
    """Whether to compile the repeated blocks of ``module`` only, because nobody chose otherwise.

    ``--regional-compile`` on the command line, with either value, is the deployer's choice.
    """
    if server_args.is_arg_explicitly_set("regional_compile"):
        return False
    conditions = getattr(module, "_compile_conditions", ())
    return any(name and any(holds(name, each) for holds in conditions) for name, each in module.named_modules())


def is_first_rank() -> bool:
    """Whether this process speaks for all ranks in the log."""
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


def logger() -> Any:
    """The host's logger, so that lines look like its own."""
    from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger

    return init_logger("sglang_cachedit_plugin")


def branch_comes(branch: Any, batch: Any) -> None:
    """Before ``CFGBranch.configure_batch``: remember the branch whose forward comes next."""
    global _branch_name
    _branch_name = branch.name


def groups_ready(result: Any, *args: Any, **kwargs: Any) -> None:
    """After ``initialize_model_parallel``."""
    build_slices()


async def tell_replicas(message: Any) -> list[Any]:
    """Answers of every data-parallel replica to a control message, in order; exceptions stand in their place.

    The host's own fan-out keeps the first replica's answer only, and knows its own message types only.
    """
    from sglang.multimodal_gen.runtime.scheduler_client import async_scheduler_client as client

    if client.context is None:
        raise ConnectionError("the server is not ready")

    async def one(endpoint: str) -> Any:
        return await client._forward_one(endpoint, message, None)

    return await asyncio.gather(*map(one, client.server_args.scheduler_endpoints), return_exceptions=True)


def answer(output: Any, error: str | None = None) -> Any:
    """A scheduler's answer to a control message."""
    from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch

    return OutputBatch(output=output, error=error)


def gather_replica(value: Any) -> list[Any]:
    """``value`` of every rank of this data-parallel replica, in order of ranks; all of them must call this."""
    import torch.distributed as dist
    from sglang.multimodal_gen.runtime.distributed import parallel_state as state

    if not dist.is_initialized() or (group := state.get_replica_group()).world_size == 1:
        return [value]
    everyone: list[Any] = [None] * group.world_size
    dist.all_gather_object(everyone, value, group=group.cpu_group)
    return everyone


def rank() -> int:
    """This process's rank, 0 without ranks."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def publishes_metrics() -> bool:
    """Whether this process speaks for its replica on ``/metrics``."""
    from sglang.multimodal_gen.runtime.observability.metrics import get_metrics

    return get_metrics() is not None
