"""A JSON Schema of config files, for editors: ``sglang-cachedit schema`` prints it.

Whatever the strict checker accepts validates here. The other way round a schema cannot do sums: sizes against
``--num-gpus``, lengths of masks and bins, attention backends against sizes are left to the checker.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .section_knobs import ATTENTION, PARALLELISM, QUANT_SPELLINGS, QUANT_TYPES, QUANTIZE, SIZES, SPELLINGS, SVDQ
from .settings import ALIASES, EITHER_KNOBS, INERT_KNOBS, KNOBS, MAX_LENGTH, PRESETS, CacheSettings, Knob
from .sources import MAX_NAME
from .tuned_schedules import MAX_ROWS, MAX_STEPS, MAX_WEIGHTS, RETIRED

_TEXT = {"type": "string", "pattern": r"\S"}
_ROOM = {"maxItems": MAX_LENGTH}


def config_schema() -> dict[str, Any]:
    """The schema of a whole file."""
    parallelism = _section(PARALLELISM, SPELLINGS["parallelism_config"])
    parallelism["properties"]["parallel_kwargs"] = {"type": ["object", "null"], "description": "Older spelling."}
    cache = _cache(secondary=False)
    profile = _cache(secondary=False)
    profile["properties"]["secondary"] = _or_null(_cache(secondary=True))
    profile["properties"]["profile"] = {"type": "null"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "--cache-dit-config of SGLang Diffusion with sglang-cachedit-plugin",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "profile": {
                "type": ["string", "null"], "minLength": 1, "description": "Profile of requests that name none.",
            },
            "cache_config": _or_null(cache, "Settings of the cache, on both backends."),
            "secondary": _or_null(_cache(secondary=True), "Settings of the second transformer where they differ."),
            "profiles": _or_null(
                {
                    "type": "object", "additionalProperties": _or_null(profile),
                    "propertyNames": {"minLength": 1, "maxLength": MAX_NAME},
                },
                "Sets of settings that requests name.",
            ),
            "parallelism_config": _or_null(parallelism, "How ranks share the model; diffusers backend."),
            "quantize_config": _or_null(_quantize(), "Number formats of the weights; diffusers backend."),
            "attention_backend": _knob(ATTENTION),
            "parallel_kwargs": {"type": ["object", "null"], "description": "Older spelling of parallelism_config."},
        },
    }


def _or_null(schema: Mapping[str, Any], description: str = "") -> dict[str, Any]:
    return {"anyOf": [dict(schema), {"type": "null"}]} | ({"description": description} if description else {})


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": dict(properties)}


def _cache(*, secondary: bool) -> dict[str, Any]:
    properties = {
        name: _knob(knob, getattr(CacheSettings, name))
        for name, knob in KNOBS.items()
        if knob.per_transformer or not secondary
    }
    properties |= {alias: properties[name] for alias, name in ALIASES.items() if name in properties}
    properties |= {
        name: {"type": ["boolean", "null"], "description": f"Without effect here: {why}."}
        for name, why in INERT_KNOBS.items()
    }
    properties["enable_sperate_cfg"] = {"type": ["boolean", "null"], "description": "Misspelt enable_separate_cfg."}
    schema = _object(properties)
    schema["not"] = {
        "properties": {"enable_taylorseer": {"const": True}, "enable_dmd": {"const": True}},
        "required": ["enable_taylorseer", "enable_dmd"],
    }
    schema["allOf"] = [_not_both(pair) for pair in ALIASES.items()]
    if not secondary:
        either = {*EITHER_KNOBS, *INERT_KNOBS, "secondary", "profile", "enable_sperate_cfg"}
        alone = {"properties": {name: False for name in properties if name not in either}}
        given = {"properties": {"error_tolerance": {"type": "number"}}, "required": ["error_tolerance"]}
        schema["allOf"].append({"if": given, "then": alone})
    return schema


def _not_both(names: Iterable[str]) -> dict[str, Any]:
    return {"not": {"required": list(names)}}


def _section(knobs: Mapping[str, Knob], spellings: Mapping[str, str]) -> dict[str, Any]:
    properties = {name: _knob(knob) for name, knob in knobs.items()}
    properties |= {old: properties[name] for old, name in spellings.items()}
    schema = _object(properties)
    autos = [(one, other) for one in SIZES for other in SIZES if one < other and {one, other} <= set(knobs)]
    rules = [_not_both(pair) for pair in spellings.items()]
    rules += [
        {"not": {"properties": {name: {"const": "auto"} for name in pair}, "required": list(pair)}} for pair in autos
    ]
    return schema | ({"allOf": rules} if rules else {})


def _quantize() -> dict[str, Any]:
    schema = _section(QUANTIZE, {})
    schema["properties"]["components_to_quantize"] = {
        "description": QUANTIZE["components_to_quantize"].doc,
        "anyOf": [
            {"type": "array", "items": _TEXT, **_ROOM},
            {
                "type": "object",
                "propertyNames": _TEXT,
                "additionalProperties": _object(
                    {name: _knob(knob) for name, knob in QUANTIZE.items() if name != "components_to_quantize"}
                ),
            },
            {"type": "null"},
        ],
    }
    schema["required"] = ["quant_type"]
    return schema


def _quant_type() -> dict[str, Any]:
    names = "|".join([*QUANT_TYPES, *QUANT_SPELLINGS, SVDQ.pattern])
    return {"anyOf": [{"enum": list(QUANT_TYPES)}, {"type": "string", "pattern": f"^({_any_case(names)})$"}]}


def _any_case(pattern: str) -> str:
    """``pattern`` for upper and lower case; JSON Schema has no flags."""
    return "".join(f"[{c}{c.upper()}]" if c.isalpha() and c != "d" else c for c in pattern.replace("\\d", "[0-9]"))


def _knob(knob: Knob, default: Any = None) -> dict[str, Any]:
    schema = _KINDS[knob.kind](knob)
    if knob.optional:
        schema = {"anyOf": [schema, {"type": "null"}]}
    schema["description"] = knob.doc + (f" Unit: {knob.unit}." if knob.unit else "")
    if default is not None:
        schema["default"] = default
    return schema


def _number(knob: Knob, kind: str) -> dict[str, Any]:
    limits = {"minimum": knob.low, "maximum": knob.high}
    return {"type": kind, **{name: limit for name, limit in limits.items() if limit is not None}}


def _rows() -> dict[str, Any]:
    """Tuned schedules; lengths and what excludes what are the checker's."""
    mask = {
        "anyOf": [
            {"type": "string", "pattern": "^1[01]*$"},
            {"type": "array", "items": {"enum": [0, 1]}, "minItems": 1, "maxItems": MAX_STEPS},
        ]
    }
    numbers = {"type": "array", "items": {"type": "number"}, "maxItems": MAX_STEPS}
    row = _object({
        "steps": {"type": "integer", "minimum": 1, "maximum": MAX_STEPS},
        "size": {"type": "string", "pattern": "[xX]"},
        "mask": mask,
        "uncond_mask": mask,
        "order": {"type": "integer", "minimum": 1, "maximum": 3},
        "damping": {"type": "number", "minimum": 0, "maximum": 1},
        "weights": {"type": "array", "items": {**numbers, "minItems": 1, "maxItems": MAX_WEIGHTS}},
        "timesteps": numbers,
    } | {key: {"description": "Ignored; error_tolerance takes its place."} for key in sorted(RETIRED)})
    row["required"] = ["steps", "mask"]
    return {"type": "array", "items": row, "minItems": 1, "maxItems": MAX_ROWS}


_KINDS: Mapping[str, Any] = {
    "rows": lambda knob: _rows(),
    "bool": lambda knob: {"type": "boolean"},
    "int": lambda knob: _number(knob, "integer"),
    "float": lambda knob: _number(knob, "number"),
    "choice": lambda knob: {"enum": list(knob.choices)},
    "bins": lambda knob: {
        "anyOf": [
            {
                "type": "array", "items": {"type": "integer", "minimum": 1, "maximum": MAX_LENGTH}, "minItems": 1,
                **_ROOM,
            },
            {"type": "string", "pattern": r"^[^A-Za-z]*\d[^A-Za-z]*$"},
        ]
    },
    "mask": lambda knob: {
        "anyOf": [
            {"enum": list(PRESETS)},
            {"type": "array", "items": {"enum": [0, 1]}, "contains": {"const": 1}, "minItems": 1, **_ROOM},
        ]
    },
    "size": lambda knob: {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 4096}, {"const": "auto"}]},
    "names": lambda knob: {"type": "array", "items": _TEXT, **_ROOM},
    "text": lambda knob: dict(_TEXT),
    "mapping": lambda knob: {"type": "object", "propertyNames": _TEXT},
    "quant_type": lambda knob: _quant_type(),
    "plan": lambda knob: {"type": "object", "propertyNames": _TEXT, "additionalProperties": _quant_type()},
    "components": lambda knob: {},
}
