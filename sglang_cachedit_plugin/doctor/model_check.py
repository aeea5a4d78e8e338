"""``sglang-cachedit doctor --model-path``: what would be cached of a model, and what would stop it."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict
from typing import Any

from ..cache.cached_model import preset_mask
from ..cache.error_control import BEGINNING
from ..cache.step_plan import build_plan
from ..config.effective import Defaults
from ..config.settings import CacheSettings
from . import model_facts
from .model_facts import Ability, FactsError

_BRANCHES = {
    "none": ["cond"], "separate": ["cond", "uncond"], "batched": ["cond"], "paired": ["cond", "uncond"],
}
_GUIDANCE = {
    "none": "one forward a step; uncond comes with true_cfg_scale above 1",
    "separate": "one forward for each branch where guidance is on",
    "batched": "one forward for all branches, which share a decision",
    "paired": "a transformer for each branch",
}
_MOST_STEPS = 100


def examine(model_path: str, model_id: str | None, settings: Defaults, found: dict[str, Any]) -> dict[str, Any] | None:
    """What the doctor says of a model; problems and warnings are added to ``found``.

    Returns:
        The model's part of the report, None where nothing can be read.
    """
    # The host logs to stdout while it is imported; stdout belongs to the report.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            model = _read(model_path, model_id)
        except FactsError as error:
            found["problems"].append(str(error))
            return None
    resolved = settings.decide(True, None).resolved
    for name, transformer in model["transformers"].items():
        own = resolved.secondary if name == "transformer_2" else resolved.primary
        transformer["fewest_steps"] = fewest_steps(own)
        for backend, each in transformer["backends"].items():
            each["stops"] = stops(each.pop("ability"), own, backend, model)
    _judge(model, found)
    return model


def _read(model_path: str, model_id: str | None) -> dict[str, Any]:
    index = model_facts.read_index(model_path)
    native = model_facts.native_facts(model_path, model_id)
    names = [name for name in model_facts.TRANSFORMERS if isinstance(index.get(name), list) and index[name][1]]
    if not names:
        raise FactsError(f"{model_path}: {index['_class_name']} has no component transformer, nothing can be cached")
    model: dict[str, Any] = {
        "path": model_path, "pipeline": index["_class_name"], "native": asdict(native) if native else None,
        "transformers": {},
    }
    for name in names:
        model["transformers"][name] = _read_transformer(model_path, name, index[name][1])
    return model


def _read_transformer(model_path: str, name: str, declared: str) -> dict[str, Any]:
    config = model_facts.read_config(model_path, name)
    class_name = config.get("_class_name", declared)
    theirs, own = model_facts.diffusers_class(class_name), model_facts.native_class(class_name)
    empty = model_facts.build_empty(theirs, config) if theirs is not None else None
    backends = {}
    for backend, cls in (("native", own), ("diffusers", theirs)):
        can = model_facts.ability(cls, empty) if cls is not None else None
        backends[backend] = _described(can) | {"ability": can}
    return {"class": class_name, "backends": backends}


def _described(can: Ability | None) -> dict[str, Any]:
    if can is None:
        return {"class": None, "family": None, "blocks": [], "branches": [], "guidance": None}
    return {
        "class": can.cls, "family": can.family, "blocks": [asdict(each) for each in can.blocks],
        "branches": _BRANCHES.get(can.cfg or "", ["cond", "uncond"]), "guidance": _GUIDANCE.get(can.cfg or ""),
    }


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


def stops(can: Ability | None, settings: CacheSettings, backend: str, model: dict[str, Any]) -> list[str]:
    """What keeps a transformer from being cached with these settings, in words."""
    native = model["native"]
    if backend == "native" and native is None:
        return ["SGLang has no pipeline of its own for this model"]
    if can is None:
        return [f"{'SGLang' if backend == 'native' else 'diffusers'} has no such class"]
    found = []
    controlled = settings.error_tolerance is not None
    if can.refused and not (can.output and (controlled or settings.forecast == "output")):
        found.append(can.refused + ("; forecast: output works" if can.output else ""))
    counts = [each.count for each in can.blocks if each.count is not None]
    first, last = settings.Fn_compute_blocks, settings.Bn_compute_blocks
    if counts and not controlled and first + last > min(counts):
        found.append(f"Fn_compute_blocks {first} + Bn_compute_blocks {last} exceed the {min(counts)} blocks of a list")
    if native is not None and native["steps"] is not None:
        fewest = fewest_steps(settings)
        if fewest is None or native["steps"] < fewest:
            found.append(f"none of the {native['steps']} steps that are the default can be cached with these settings")
    return found


def _judge(model: dict[str, Any], found: dict[str, Any]) -> None:
    backends = ("native", "diffusers")
    by_backend = {
        backend: [
            f"{name}: {stop}"
            for name, transformer in model["transformers"].items()
            for stop in transformer["backends"][backend]["stops"]
        ]
        for backend in backends
    }
    lines = [f"{model['pipeline']}, {backend} backend, {each}" for backend in backends for each in by_backend[backend]]
    found["problems" if all(by_backend.values()) else "warnings"] += lines
    if model["native"] and model["native"]["graphs_by_default"]:
        found["warnings"].append(
            f"{model['pipeline']}: SGLang may switch breakable CUDA graphs on by itself; then only static "
            "schedules with forecast: output are cached; pass --enable-breakable-cuda-graph false, or set "
            "SGLANG_CACHE_DIT_ENABLED=true"
        )


def lines(model: dict[str, Any]) -> list[str]:
    """``examine``'s result as text."""
    native = model["native"]
    steps = f", {native['steps']} steps by default" if native and native["steps"] else ""
    out = ["model", f"  {'pipeline':<24} {model['pipeline']}{steps}"]
    for name, transformer in model["transformers"].items():
        out.append(f"  {name:<24} {transformer['class']}")
        for backend, each in transformer["backends"].items():
            out.append(f"    {backend:<22} {_line(each)}")
            if each["branches"] and not each["stops"]:
                guidance = f" ({each['guidance']})" if each["guidance"] else ""
                out.append(f"    {'':<22} branches {', '.join(each['branches'])}{guidance}")
        out.append(f"    {'needs':<22} {transformer['fewest_steps'] or 'more than ' + str(_MOST_STEPS)} steps or more")
    out.append(f"  {'also stops caching':<24} enable_cache_dit: false in a request; --enable-breakable-cuda-graph true")
    return out


def _line(backend: dict[str, Any]) -> str:
    if backend["stops"]:
        return "not cached: " + "; ".join(backend["stops"])
    lists = []
    for each in backend["blocks"]:
        count = f"{each['count']} blocks, " if each["count"] else ""
        lists.append(f"{each['name']} ({count}{each['pattern']})")
    family = f"{backend['family']}: " if backend["family"] else ""
    return family + ("; ".join(lists) or "the whole output")
