"""JSON Schemas of what settings stand in: config files, for editors (``sglang-cachedit schema`` prints it), changes of
a running server and requests, for OpenAPI.

Whatever the strict checker accepts validates here. The other way round a schema cannot do sums: sizes against
``--num-gpus``, lengths of masks and bins, attention backends against sizes are left to the checker.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from .diffusers_sections import ATTENTION, PARALLELISM, QUANTIZE, SIZES, SPELLINGS
from .knobs import Knob, json_object
from .settings import ALIASES, EITHER_KNOBS, INERT_KNOBS, MISSPELT, CacheSettings
from .sources import ENABLED, MAX_NAME, keys

_OLDER = {"type": ["object", "null"], "description": "Older spelling of parallelism_config."}
_PROFILE = {"type": ["string", "null"], "minLength": 1, "description": "Name of a profile."}
_SECOND = "Settings of the second transformer where they differ."
_PROFILES = "Sets of settings that requests name."


def config_schema() -> dict[str, Any]:
    """The schema of a whole file."""
    parallelism = _object(PARALLELISM, SPELLINGS)
    parallelism["properties"]["parallel_kwargs"] = _OLDER
    parallelism["allOf"] += [
        {"not": {"properties": {name: {"const": "auto"} for name in pair}, "required": list(pair)}}
        for pair in itertools.combinations(SIZES, 2)
    ]
    quantize = json_object(QUANTIZE) | {"required": ["quant_type"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "--cache-dit-config of SGLang Diffusion with sglang-cachedit-plugin",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "profile": _PROFILE,
            "cache_config": _or_null(_cache(), "Settings of the cache, on both backends."),
            "secondary": _or_null(_cache(secondary=True), _SECOND),
            "profiles": _or_null(_profiles(), _PROFILES),
            "parallelism_config": _or_null(parallelism, "How ranks share the model; diffusers backend."),
            "quantize_config": _or_null(quantize, "Number formats of the weights; diffusers backend."),
            "attention_backend": ATTENTION.schema(),
            "parallel_kwargs": _OLDER,
        },
    }


def change_schema(*, patch: bool = False) -> dict[str, Any]:
    """The schema of a live change; what excludes what is left to the checker, as tools for OpenAPI expect it.

    Args:
        patch: of one that is added to the change in force, where null takes a setting back.
    """
    settings, second = (_cache(secondary=second, rules=False) for second in (False, True))
    if patch:
        for each in (settings, second):
            each["properties"] = {name: _or_null(schema) for name, schema in each["properties"].items()}
    own = {
        "enabled": _or_null(ENABLED.schema(), "Whether requests that say nothing are cached."),
        "profile": _PROFILE,
        "cache_config": _or_null(settings, "Settings, in place of those beside it."),
        "secondary": _or_null(second, _SECOND),
        "profiles": _or_null(_profiles(rules=False), _PROFILES),
    }
    text = "New defaults of the server. Settings stand here or in cache_config."
    return settings | {"description": text, "properties": settings["properties"] | own}


def request_schema() -> dict[str, Any]:
    """The schemas of the fields of a request; what excludes what is left to the checker."""
    profile = _PROFILE | {"description": "quality, balanced, fast, or another one of the server's."}
    text = "Settings of the cache for this request, `profile` and `secondary`."
    switch = ENABLED.schema() | {"description": "Whether to cache; the server decides where left out."}
    params = _with_secondary(profile, rules=False) | {"description": text}
    return {"enable_cache_dit": switch, "cache_dit_params": params}


def _with_secondary(profile: Mapping[str, Any], *, rules: bool) -> dict[str, Any]:
    schema, second = _cache(rules=rules), _or_null(_cache(secondary=True, rules=rules), _SECOND)
    return schema | {"properties": schema["properties"] | {"secondary": second, "profile": profile}}


def _profiles(*, rules: bool = True) -> dict[str, Any]:
    names = {"minLength": 1, "maxLength": MAX_NAME}
    profile = _with_secondary({"type": "null"}, rules=rules)
    return {"type": "object", "propertyNames": names, "additionalProperties": _or_null(profile)}


def _or_null(schema: Mapping[str, Any], description: str = "") -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]} | ({"description": description} if description else {})


def _object(knobs: Mapping[str, Knob], spellings: Mapping[str, str]) -> dict[str, Any]:
    """A mapping of settings, none of them under two names."""
    schema = json_object(knobs, CacheSettings())
    others = {other: name for other, name in spellings.items() if name in knobs}
    schema["properties"] |= {other: schema["properties"][name] for other, name in others.items()}
    return schema | {"allOf": [{"not": {"required": list(pair)}} for pair in others.items()]}


def _cache(*, secondary: bool = False, rules: bool = True) -> dict[str, Any]:
    schema = _object(keys(secondary=secondary), {**ALIASES, **MISSPELT})
    if not rules:
        del schema["allOf"]
        return schema
    schema["allOf"].append({"not": {
        "properties": {"enable_taylorseer": {"const": True}, "enable_dmd": {"const": True}},
        "required": ["enable_taylorseer", "enable_dmd"],
    }})
    if not secondary:
        either = {*EITHER_KNOBS, *INERT_KNOBS, *MISSPELT}
        alone = {"properties": {name: False for name in schema["properties"] if name not in either}}
        given = {"properties": {"error_tolerance": {"type": "number"}}, "required": ["error_tolerance"]}
        schema["allOf"].append({"if": given, "then": alone})
    return schema
