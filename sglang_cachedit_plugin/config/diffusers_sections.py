"""Reads the sections of a config file that cache-dit carries out on the diffusers backend.

cache-dit ignores keys that it does not know; here they are errors, as are values that contradict each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import SettingError, nearest, shown
from .section_knobs import (
    ATTENTION,
    ATTENTION_BACKENDS,
    NOT_IN_A_FILE,
    PARALLELISM,
    QUANT_SPELLINGS,
    QUANTIZE,
    SIZES,
    SPELLINGS,
    ULYSSES_VARIANTS,
    SectionKnob,
)


def read_sections(raw: Mapping[str, Any], label: str, warnings: list[str]) -> dict[str, Any]:
    """The sections that ``raw``, a whole file, holds, checked.

    Args:
        label: name of the file in errors.

    Raises:
        SettingError: a key or value that cannot be used, or two that contradict each other.
    """
    found: dict[str, Any] = {}
    parallelism = unfold_parallel_kwargs(raw, label, warnings)
    if parallelism is not None:
        found["parallelism_config"] = read_parallelism(parallelism, f"{label} parallelism_config", warnings)
    if raw.get("quantize_config") is not None:
        found["quantize_config"] = read_quantize(raw["quantize_config"], f"{label} quantize_config", warnings)
    if raw.get("attention_backend") is not None:
        backend = found["attention_backend"] = ATTENTION.check("attention_backend", raw["attention_backend"], label)
        other = found.get("parallelism_config", {}).get("attention_backend")
        if other not in (None, backend):
            raise SettingError(
                "attention_backend", backend, label, f"contradicts attention_backend {other} of parallelism_config"
            )
    _check_attention(found, label)
    return found


def read_parallelism(raw: Any, origin: str, warnings: list[str]) -> dict[str, Any]:
    """A ``parallelism_config``; sizes may still be ``auto``, see ``topology``."""
    values = _read(raw, PARALLELISM, "parallelism_config", origin, warnings)
    autos = [name for name in SIZES if values.get(name) == "auto"]
    if len(autos) > 1:
        raise SettingError(autos[1], "auto", origin, f"{autos[0]} is auto already, only one size can be")
    ulysses, ring = values.get("ulysses_size", 1), values.get("ring_size", 1)
    for name in ULYSSES_VARIANTS:
        if values.get(name) and ulysses == 1:
            raise SettingError(name, True, origin, "expected ulysses_size of at least 2 with it")
    if values.get("ulysses_anything") and ring != 1:
        raise SettingError("ulysses_anything", True, origin, f"does not work with ring_size {ring}")
    if all(values.get(name, 1) == 1 for name in SIZES):
        raise SettingError("parallelism_config", raw, origin, f"expected one of {', '.join(SIZES)} above 1")
    return values


def read_quantize(raw: Any, origin: str, warnings: list[str]) -> dict[str, Any]:
    """A ``quantize_config``."""
    values = _read(raw, QUANTIZE, "quantize_config", origin, warnings)
    if "quant_type" not in values:
        raise SettingError("quant_type", None, origin, "is missing, " + QUANTIZE["quant_type"].allowed())
    svdq = values["quant_type"].startswith("svdq")
    for name in ("svdq_kwargs", "serialize_to"):
        if name in values and not svdq:
            raise SettingError(name, values[name], origin, "is for svdq types only")
    for name in ("components_to_quantize", "precision_plan"):
        if name in values and svdq:
            raise SettingError(name, values[name], origin, "svdq types do not take it")
    if isinstance(components := values.get("components_to_quantize"), Mapping):
        values["components_to_quantize"] = {
            name: _read_component(each, f"{origin} components_to_quantize.{name}", warnings)
            for name, each in components.items()
        }
    return values


def _read_component(raw: Any, origin: str, warnings: list[str]) -> dict[str, Any]:
    own = {name: knob for name, knob in QUANTIZE.items() if name != "components_to_quantize"}
    return _read(raw, own, "quantize_config", origin, warnings)


def _read(
    raw: Any, knobs: Mapping[str, SectionKnob], section: str, origin: str, warnings: list[str]
) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise SettingError(section, raw, origin, "expected a mapping of settings")
    values: dict[str, Any] = {}
    spellings = SPELLINGS[section]
    for key, value in raw.items():
        name = spellings.get(key, key) if isinstance(key, str) else shown(key)
        if name in NOT_IN_A_FILE:
            raise SettingError(name, value, origin, NOT_IN_A_FILE[name])
        if name not in knobs:
            raise SettingError(name, value, origin, "unknown key", nearest(name, [*knobs, *spellings]))
        if name in values:
            raise SettingError(name, value, origin, f"given twice, also as {name}")
        checked = knobs[name].check(name, _respell(name, value, origin, warnings), origin)
        if checked is not None:
            values[name] = checked
    return values


def _respell(name: str, value: Any, origin: str, warnings: list[str]) -> Any:
    if name == "quant_type" and isinstance(value, str) and value.lower() in QUANT_SPELLINGS:
        warnings.append(f"quant_type {value} ({origin}) is read as {QUANT_SPELLINGS[value.lower()]}")
        return QUANT_SPELLINGS[value.lower()]
    return value


def _check_attention(found: Mapping[str, Any], label: str) -> None:
    parallelism = found.get("parallelism_config", {})
    name = parallelism.get("attention_backend") or found.get("attention_backend") or "native"
    backend = ATTENTION_BACKENDS[name]
    split = any(parallelism.get(size, 1) != 1 for size in ("ulysses_size", "ring_size"))
    if split and not backend.split:
        able = ", ".join(known for known, each in ATTENTION_BACKENDS.items() if each.split)
        raise SettingError("attention_backend", name, label, f"does not split sequences, expected one of {able}")
    if parallelism.get("ring_size", 1) != 1 and not backend.lse:
        able = ", ".join(known for known, each in ATTENTION_BACKENDS.items() if each.lse)
        raise SettingError("attention_backend", name, label, f"has no ring kernel, expected one of {able}")


def unfold_parallel_kwargs(raw: Mapping[str, Any], label: str, warnings: list[str]) -> Any:
    """``parallelism_config`` with the older ``parallel_kwargs``, at top level or nested, as part of it."""
    parallelism = raw.get("parallelism_config")
    older = raw.get("parallel_kwargs")
    if isinstance(parallelism, Mapping) and "parallel_kwargs" in parallelism:
        older = parallelism["parallel_kwargs"]
    if older is None:
        return parallelism
    if not isinstance(older, Mapping) or (parallelism is not None and not isinstance(parallelism, Mapping)):
        raise SettingError("parallel_kwargs", older, label, "expected a mapping of settings")
    warnings.append(f"parallel_kwargs ({label}) is read as part of parallelism_config")
    kept = {key: value for key, value in (parallelism or {}).items() if key != "parallel_kwargs"}
    return {**older, **kept}
