"""Answers of ``/v1/cache_dit`` as OpenAPI describes them; ``config.json_schema`` describes what is sent."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


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
