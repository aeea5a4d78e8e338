"""``sglang-cachedit doctor --model-path``: what would be cached of a model, and what would stop it.

No weights are needed: the engine's own look-up runs on a module on the meta device. Imports of the host and of
diffusers stand inside functions: they take as long as starting the host does.
"""

from __future__ import annotations

import contextlib
import json
import operator
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from .. import adapters
from ..adapters import Blocks
from ..cache import block_lists
from ..cache.cached_model import preset_mask
from ..cache.error_control import BEGINNING
from ..cache.step_plan import build_plan
from ..config.effective import Defaults
from ..config.settings import CacheSettings
from ..errors import CacheDitError, MountError, Reason, one_line, reason_of

_BRANCHES = {
    "none": (["cond"], "one forward a step; uncond comes with true_cfg_scale above 1"),
    "separate": (["cond", "uncond"], "one forward for each branch where guidance is on"),
    "batched": (["cond"], "one forward for all branches, which share a decision"),
    "paired": (["cond", "uncond"], "a transformer for each branch"),
    None: (["cond", "uncond"], None),
}
_MOST_STEPS = 100


def examine(model_path: str, model_id: str | None, settings: Defaults, found: dict[str, Any]) -> dict[str, Any] | None:
    """What the doctor says of a model; problems and warnings are added to ``found``.

    Returns:
        The model's part of the report, None where nothing can be read.
    """
    resolved = settings.decide(True, None).resolved
    # The host logs to stdout while it is imported; stdout belongs to the report.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            index = _index(model_path)
            names = [name for name in ("transformer", "transformer_2") if isinstance(index.get(name), list)]
            native = _native(model_path, model_id)
            transformers = {
                name: _transformer(
                    model_path, name, index[name][1], native,
                    resolved.secondary if name == "transformer_2" else resolved.primary,
                )
                for name in names if index[name][1]
            }
            if not transformers:
                pipeline = index["_class_name"]
                raise CacheDitError(f"{model_path}: {pipeline} has no component transformer, nothing can be cached")
        except CacheDitError as error:
            found["problems"].append(str(error))
            return None
    model = {"path": model_path, "pipeline": index["_class_name"], "native": native, "transformers": transformers}
    _judge(model, found)
    return model


def _index(model_path: str) -> dict[str, Any]:
    """``model_index.json``; CacheDitError where there is none that can be read."""
    from sglang.multimodal_gen.runtime.utils.hf_diffusers_utils import maybe_download_model_index

    try:
        index = maybe_download_model_index(model_path)
    except Exception as error:
        # The host raises whatever its hub client and its checks of folders raise.
        raise CacheDitError(f"{model_path}: {one_line(error)[:300]}") from None
    if "_class_name" not in index:
        raise CacheDitError(f"{model_path}: no model_index.json that names a pipeline")
    return index


def _config(model_path: str, component: str) -> dict[str, Any]:
    """``config.json`` of a component of a folder or of a repository of the hub; CacheDitError where there is none."""
    name = f"{component}/config.json"
    try:
        path = Path(model_path) / name
        if not Path(model_path).is_dir():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(model_path, name))
        return json.loads(path.read_text(encoding="utf-8"))
    except Exception as error:
        raise CacheDitError(f"{model_path}: {name}: {one_line(error)[:300]}") from None


def _native(model_path: str, model_id: str | None) -> dict[str, Any] | None:
    """SGLang's own pipeline, None where it has none for this model."""
    from sglang.multimodal_gen.registry import get_model_info

    info = get_model_info(model_path, backend="sglang", model_id=model_id)
    if info is None:
        return None
    config, name = info.pipeline_config_cls(), info.pipeline_cls.__name__
    graphs = getattr(config.get_model_deployment_config(), "bcg_default_pipeline_class_names", ())
    return {
        "pipeline": name, "task": config.task_type.name, "steps": info.sampling_param_cls().num_inference_steps,
        "graphs_by_default": name in graphs,
    }


def _classes(name: str) -> dict[str, type | None]:
    """SGLang's class and that of diffusers for a component's class name, None where there is none."""
    import diffusers
    from sglang.multimodal_gen.runtime.models.registry import ModelRegistry

    own, theirs = None, getattr(diffusers, name, None)
    # The registry raises bare exceptions for names that it does not know or cannot import.
    with contextlib.suppress(Exception):
        own = ModelRegistry.resolve_model_cls(name)[0]
    return {"native": own, "diffusers": theirs if isinstance(theirs, type) else None}


def _empty(cls: type | None, config: dict[str, Any]) -> nn.Module | None:
    """The module on the meta device, without weights; None where its constructor does not take ``config``."""
    import torch

    # Constructors of configurations from other versions raise whatever they run into.
    with contextlib.suppress(Exception), torch.device("meta"):
        return cls.from_config(config)  # type: ignore[union-attr]
    return None


def _transformer(
    model_path: str, name: str, declared: str, native: dict[str, Any] | None, settings: CacheSettings
) -> dict[str, Any]:
    config = _config(model_path, name)
    class_name = config.get("_class_name", declared)
    classes, fewest = _classes(class_name), fewest_steps(settings)
    empty, backends = _empty(classes["diffusers"], config), {}
    for backend, cls in classes.items():
        blocks, stops = _lookup(cls, empty, name, settings) if cls is not None else ([], [])
        if cls is None:
            stops.append(Reason("model", f"{'SGLang' if backend == 'native' else 'diffusers'} has no such class"))
        if backend == "native" and native is None:
            stops = [Reason("model", "SGLang has no pipeline of its own for this model")]
        elif native is not None and native["steps"] is not None and (fewest is None or native["steps"] < fewest):
            why = f"none of the {native['steps']} steps that are the default can be cached with these settings"
            stops.append(Reason("steps", why))
        row = None if cls is None else adapters.find_adapter(cls)
        branches, guidance = _BRANCHES[None if row is None else row.cfg]
        backends[backend] = {
            "class": None if cls is None else f"{cls.__module__}.{cls.__name__}", "blocks": blocks,
            "family": None if row is None else row.family, "branches": [] if cls is None else branches,
            "guidance": guidance, "stops": stops, "codes": [each.code for each in stops],
        }
    return {"class": class_name, "fewest_steps": fewest, "backends": backends}


def _lookup(
    cls: type, empty: nn.Module | None, name: str, settings: CacheSettings
) -> tuple[list[dict[str, Any]], list[Reason]]:
    """The block lists of a class as the engine finds them, and why they are not cached.

    Args:
        empty: a module of the same architecture without weights: SGLang's own classes cannot be built without the host.
    """
    row = adapters.find_adapter(cls)
    try:
        if isinstance(empty, cls) and (row is None or row.blocks):
            lists: list[Blocks] = block_lists.describe(empty)
        elif row is not None:
            lists = list(row.blocks)
        else:
            raise MountError(Reason("no_adapter", f"{cls.__name__}: no adapter describes its blocks"))
    except MountError as error:
        return [], [reason_of(error, "blocks")]
    sizes: list[int] = []
    described = []
    for each in lists:
        count = _count(empty, each.name)
        described.append({"name": each.name, "count": count, "pattern": "streams " + ", ".join(each.streams)})
        if count is not None and each.shares_decision and sizes:
            sizes[-1] += count
        elif count is not None:
            sizes.append(count)
    why = block_lists.why_not_cached(cls, settings, sizes, name=name)
    return described, [] if why is None else [why]


def _count(empty: nn.Module | None, path: str) -> int | None:
    try:
        return len(operator.attrgetter(path)(empty))
    except (AttributeError, TypeError):
        return None


def fewest_steps(settings: CacheSettings) -> int | None:
    """Steps from which on something may be cached, None where never."""
    if settings.error_tolerance is not None:
        # The last step is computed too.
        return BEGINNING + 2 if settings.error_tolerance else None
    for steps in range(1, _MOST_STEPS + 1):
        plan, _ = build_plan(settings, steps, preset_mask)
        if plan.may_cache and (plan.static or settings.residual_diff_threshold > 0.0):
            return steps
    return None


def _judge(model: dict[str, Any], found: dict[str, Any]) -> None:
    by_backend = {
        backend: [
            f"{model['pipeline']}, {backend} backend, {name}: {stop} [{stop.code}]"
            for name, transformer in model["transformers"].items()
            for stop in transformer["backends"][backend]["stops"]
        ]
        for backend in ("native", "diffusers")
    }
    lines = [line for stops in by_backend.values() for line in stops]
    found["problems" if all(by_backend.values()) else "warnings"] += lines
    if model["native"] and model["native"]["graphs_by_default"]:
        found["warnings"].append(
            f"{model['pipeline']}: SGLang may switch breakable CUDA graphs on by itself; then only static "
            "schedules with forecast: output are cached; pass --enable-breakable-cuda-graph false, or set "
            "SGLANG_CACHE_DIT_ENABLED=true"
        )


def lines(model: dict[str, Any]) -> Iterator[str]:
    """``examine``'s result as text."""
    native = model["native"]
    steps = f", {native['steps']} steps by default" if native and native["steps"] else ""
    yield "model"
    yield f"  {'pipeline':<24} {model['pipeline']}{steps}"
    for name, transformer in model["transformers"].items():
        yield f"  {name:<24} {transformer['class']}"
        for backend, each in transformer["backends"].items():
            yield f"    {backend:<22} {_line(each)}"
            if each["branches"] and not each["stops"]:
                guidance = f" ({each['guidance']})" if each["guidance"] else ""
                yield f"    {'':<22} branches {', '.join(each['branches'])}{guidance}"
        yield f"    {'needs':<22} {transformer['fewest_steps'] or 'more than ' + str(_MOST_STEPS)} steps or more"
    yield f"  {'also stops caching':<24} enable_cache_dit: false in a request; --enable-breakable-cuda-graph true"


def _line(backend: dict[str, Any]) -> str:
    if backend["stops"]:
        return "not cached: " + "; ".join(f"{stop} [{stop.code}]" for stop in backend["stops"])
    lists = [
        f"{each['name']} ({str(each['count']) + ' blocks, ' if each['count'] else ''}{each['pattern']})"
        for each in backend["blocks"]
    ]
    return (f"{backend['family']}: " if backend["family"] else "") + ("; ".join(lists) or "the whole output")
