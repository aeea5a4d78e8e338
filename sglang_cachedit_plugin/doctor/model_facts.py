"""What can be known of a model without its weights: index, configurations, classes, defaults.

Imports of the host and of diffusers stand inside functions: they take as long as starting the host does.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .. import adapters
from ..cache import block_lists
from ..errors import CacheDitError, MountError

TRANSFORMERS = ("transformer", "transformer_2")


class FactsError(CacheDitError):
    """A model of which nothing can be read; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class BlockList:
    """One list of blocks that is cached.

    Args:
        name: attribute path in the transformer.
        count: blocks of the list, None where the class cannot be built without weights.
        pattern: what the blocks take and return.
    """

    name: str
    count: int | None
    pattern: str


@dataclass(frozen=True, kw_only=True)
class Ability:
    """What of one transformer class can be left out.

    Args:
        refused: why its blocks cannot be cached, None where they can.
        output: whether the whole output can be forecast.
        cfg: how guidance runs, see ``adapters.ModelAdapter``; None where no row says it.
    """

    cls: str
    family: str | None
    blocks: tuple[BlockList, ...] = ()
    refused: str | None = None
    output: bool = True
    cfg: str | None = None


@dataclass(frozen=True, kw_only=True)
class NativeFacts:
    """SGLang's own pipeline for a model."""

    pipeline: str
    task: str
    steps: int | None
    graphs_by_default: bool


def read_index(model_path: str) -> dict[str, Any]:
    """``model_index.json``.

    Raises:
        FactsError: there is none, or it cannot be read.
    """
    from sglang.multimodal_gen.runtime.utils.hf_diffusers_utils import maybe_download_model_index

    try:
        index = maybe_download_model_index(model_path)
    except Exception as error:
        # The host raises whatever its hub client and its checks of folders raise.
        raise FactsError(f"{model_path}: {' '.join(str(error).split())[:300]}") from None
    if "_class_name" not in index:
        raise FactsError(f"{model_path}: no model_index.json that names a pipeline")
    return index


def read_config(model_path: str, component: str) -> dict[str, Any]:
    """``config.json`` of a component, of a folder or a repository of the hub.

    Raises:
        FactsError: it cannot be read.
    """
    name = f"{component}/config.json"
    try:
        path = Path(model_path) / name
        if not Path(model_path).is_dir():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(model_path, name))
        return json.loads(path.read_text(encoding="utf-8"))
    except Exception as error:
        raise FactsError(f"{model_path}: {name}: {' '.join(str(error).split())[:300]}") from None


def native_facts(model_path: str, model_id: str | None = None) -> NativeFacts | None:
    """SGLang's own pipeline, None where it has none for this model."""
    from sglang.multimodal_gen.registry import get_model_info

    info = get_model_info(model_path, backend="sglang", model_id=model_id)
    if info is None:
        return None
    config = info.pipeline_config_cls()
    deployment = config.get_model_deployment_config()
    name = info.pipeline_cls.__name__
    return NativeFacts(
        pipeline=name, task=config.task_type.name, steps=info.sampling_param_cls().num_inference_steps,
        graphs_by_default=name in getattr(deployment, "bcg_default_pipeline_class_names", ()),
    )


def native_class(name: str) -> type | None:
    """SGLang's class for a component's class name, None where it has none."""
    from sglang.multimodal_gen.runtime.models.registry import ModelRegistry

    try:
        return ModelRegistry.resolve_model_cls(name)[0]
    except Exception:
        # The registry raises bare exceptions for names that it does not know or cannot import.
        return None


def diffusers_class(name: str) -> type | None:
    """The class of diffusers, None where it has none of that name."""
    import diffusers

    found = getattr(diffusers, name, None)
    return found if isinstance(found, type) else None


def build_empty(cls: type, config: dict[str, Any]) -> nn.Module | None:
    """The module on the meta device, without weights; None where its constructor does not take ``config``."""
    import torch

    try:
        with torch.device("meta"):
            return cls.from_config(config)
    except Exception:
        # Constructors of configurations from other versions raise whatever they run into.
        return None


def ability(cls: type, empty: nn.Module | None) -> Ability:
    """What of a class can be left out.

    Args:
        empty: a module of the same architecture without weights, to count blocks, where there is one.
    """
    row = adapters.find_adapter(cls)
    name = f"{cls.__module__}.{cls.__name__}"
    if row is None:
        return _from_register(name, cls, empty)
    return Ability(
        cls=name, family=row.family, cfg=row.cfg, output=row.ability != "none",
        refused=row.output_only or row.unsupported or None,
        blocks=_lists(row.blocks, empty),
    )


def _from_register(name: str, cls: type, empty: nn.Module | None) -> Ability:
    """What cache-dit's own register says of a class without a row."""
    if empty is None or not isinstance(empty, cls):
        return Ability(cls=name, family=None, refused=f"{cls.__name__}: no adapter describes its blocks")
    try:
        found = block_lists.describe(empty)
    except MountError as error:
        return Ability(cls=name, family=None, refused=str(error))
    return Ability(cls=name, family=None, blocks=_lists(found, empty))


def _count(empty: nn.Module | None, path: str) -> int | None:
    try:
        return len(operator.attrgetter(path)(empty))
    except (AttributeError, TypeError):
        return None


def _lists(blocks: Iterable[adapters.Blocks], empty: nn.Module | None) -> tuple[BlockList, ...]:
    return tuple(
        BlockList(name=each.name, count=_count(empty, each.name), pattern="streams " + ", ".join(each.streams))
        for each in blocks
    )
