"""Bodies of ``/v1/cache_dit`` as OpenAPI describes them; the checks themselves are those of the settings."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from ..config.settings import ALIASES, INERT_KNOBS, KNOBS, PRESETS, Knob


class ValueWithOrigin(BaseModel):
    """A value in force and where it came from."""

    value: Any
    origin: str


class Totals(BaseModel):
    """Answers of this server since it started, and steps of their conditional branches."""

    cached_requests: int
    uncached_requests: int
    computed_steps: int
    cached_steps: int


class Transformer(BaseModel):
    """A mounted transformer: its class, and its block lists with their lengths."""

    model_config = ConfigDict(populate_by_name=True)
    class_name: str = Field(alias="class")
    blocks: dict[str, int]


class MountedModel(BaseModel):
    """A model whose transformers can be cached; bytes are those held for cached steps right now."""

    backend: Literal["native", "diffusers"]
    transformers: dict[str, Transformer]
    buffer_bytes: int


class Rank(BaseModel):
    """One worker process; ``settings`` names its settings, equal names are equal settings."""

    rank: int
    settings: str
    mounted: list[MountedModel]


class Replica(BaseModel):
    """One data-parallel replica."""

    replica: int
    ranks: list[Rank]


class Workers(BaseModel):
    """What the workers said, how long ago, and whether all of them hold this process's settings."""

    replicas: list[Replica]
    age_s: float
    consistent: bool


class Changed(BaseModel):
    """What a setting was before a change, and what it is now."""

    before: Any
    now: Any


class State(BaseModel):
    """Settings of requests that say nothing, what is mounted, and totals."""

    enabled: ValueWithOrigin
    profile: str | None = Field(description="Profile of requests that name none.")
    config: dict[str, ValueWithOrigin]
    profiles: list[str]
    control: dict[str, Any] | None = Field(description="The change in force as it was sent; null at start-up settings.")
    workers: Workers | None = Field(description="Null until the workers have answered once.")
    totals: Totals
    changed: dict[str, Changed] | None = Field(None, description="What this PUT, PATCH or DELETE changed; else null.")


class Refusal(BaseModel):
    """Why a change was refused, in one line."""

    detail: str


_TYPES: dict[str, Any] = {
    "bool": bool, "int": int, "float": float, "bins": str | list[int], "mask": Literal[PRESETS] | list[Literal[0, 1]],
    "rows": list[dict[str, Any]],
}


def _field(knob: Knob) -> tuple[Any, Any]:
    kind = Literal[knob.choices] if knob.kind == "choice" else _TYPES.get(knob.kind, Any)
    unit = f" Unit: {knob.unit}." if knob.unit else ""
    return kind | None, Field(default=None, ge=knob.low, le=knob.high, description=knob.doc + unit)


def _knobs(name: str, doc: str, second_only: bool = False, **more: Any) -> type[BaseModel]:
    shown = {key: knob for key, knob in KNOBS.items() if knob.per_transformer or not second_only}
    fields = {key: _field(knob) for key, knob in shown.items()}
    fields |= {alias: _field(KNOBS[key]) for alias, key in ALIASES.items()}
    fields |= {key: (bool | None, Field(default=None, description=why)) for key, why in INERT_KNOBS.items()}
    return create_model(name, __doc__=doc, __config__=ConfigDict(extra="forbid"), **fields, **more)


Secondary = _knobs("CacheDitSecondary", "Settings of the second transformer.", True)
Profile = _knobs("CacheDitProfile", "A named set of settings.", secondary=(Secondary | None, None))
Knobs = _knobs("CacheDitKnobs", "Settings of the cache.")
Change = _knobs(
    "CacheDitChange",
    "New defaults of the server. Settings stand here or in cache_config.",
    enabled=(bool | None, Field(default=None, description="Whether requests that say nothing are cached.")),
    profile=(str | None, Field(default=None, description="Profile of requests that name none.")),
    cache_config=(Knobs | None, Field(default=None, description="Settings, in place of those beside it.")),
    secondary=(Secondary | None, Field(default=None, description="Settings of the second transformer.")),
    profiles=(dict[str, Profile] | None, Field(default=None, description="Profiles that requests may name.")),
)


Params = _knobs(
    "CacheDitParams", "Settings of one request.", secondary=(Secondary | None, None),
    profile=(str | None, Field(default=None, description="Profile: quality, balanced, fast, or one of the server's.")),
)


def request_fields() -> dict[str, Any]:
    """JSON schemas of the fields that requests for pictures and videos may carry."""
    switch = {"type": "boolean", "description": "Whether to cache; the server decides where left out."}
    return {"enable_cache_dit": switch, "cache_dit_params": schema(Params)}


def schema(model: type[BaseModel]) -> dict[str, Any]:
    """A model's JSON schema in one piece, as it can stand in a request body's description."""
    whole = model.model_json_schema()
    parts = whole.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, dict):
            if (name := node.get("$ref", "").removeprefix("#/$defs/")) in parts:
                return inline(parts[name] | {key: value for key, value in node.items() if key != "$ref"})
            return {key: inline(value) for key, value in node.items()}
        return [inline(each) for each in node] if isinstance(node, list) else node

    return inline(whole)
