"""Everything that is asked of SGLang: identity of a forward, groups of ranks, versions.

The only importer of sglang. Imports stand inside functions: the plugin is loaded in processes that must not
import the runtime early.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib import metadata
from typing import Any

from .runtime import Identity
from .stats import COND

SUPPORTED_HOSTS = ("0.5.21", "0.5.22", "0.5.23")
_BRANCH_NAMES = {"conditional": COND, "unconditional": "uncond"}

_branch_name: str | None = None
_slices: dict[str, Any] = {}


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


def model_group(server_args: Any, *, pair: bool = False) -> Any:
    """Process group of the ranks that share one forward, None for a single rank.

    Args:
        pair: include the CFG ranks, because one forward or one decision covers the pair.
    """
    from sglang.multimodal_gen.runtime.distributed import parallel_state as state

    if not state.model_parallel_is_initialized():
        return None
    if pair and state.get_classifier_free_guidance_world_size() > 1:
        return _slices["pair"]
    sp, tp = state.get_sp_group(), state.get_tp_group()
    if sp.world_size > 1 and tp.world_size > 1:
        return _slices["model"]
    for group in (sp, tp):
        if group.world_size > 1:
            return group.device_group
    return None


def build_slices() -> None:
    """Make the process groups that the host has no name for. Every rank calls this once, at start-up."""
    import torch.distributed as dist
    from sglang.multimodal_gen.runtime.distributed import parallel_state as state

    if dist.get_world_size() == 1 or _slices:
        return
    own = {
        "model": [state.get_sp_group().ranks, state.get_tp_group().ranks],
        "pair": [state.get_sp_group().ranks, state.get_tp_group().ranks, state.get_cfg_group().ranks],
    }
    everyone: list[dict[str, list[list[int]]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, own)
    for kind in ("model", "pair"):
        for members in connected([ranks for each in everyone for ranks in each[kind]]):
            group = dist.new_group(members)
            if dist.get_rank() in members:
                _slices[kind] = group


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
