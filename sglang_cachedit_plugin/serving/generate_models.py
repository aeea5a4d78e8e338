"""Bodies of ``POST /generate``."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_SEED = 2**63 - 1
TEXTS = frozenset({
    "action_mode", "action_normalization", "action_view_point", "aspect_ratio", "continuation_prompts", "control_hint",
    "domain_name", "domain_names", "flux3_mode", "negative_metadata_mode", "output_mode", "per_view_negative_prompt",
    "preset", "prompt_format", "prompt_ref", "quality", "reference_resize_mode", "resolution", "segments",
    "sr_target_resize_mode", "sr_target_resolution", "target", "task", "transfer_output_size",
})
"""Arguments of single models that are text and no place. Text in any other one may name a file: Cosmos-Dreams opens the
path that ``action`` or ``frustum_geometry`` gives, MiniMax H3 what stands in ``conditions``."""
_Scale = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Pixels = Annotated[int, Field(ge=1, le=16384)]


class GenerateRequest(BaseModel):
    """One picture or video. Model-specific arguments may stand beside these; what the model does not take is left
    out, and the answer's ``notes`` say so.
    """

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        json_schema_extra={"example": {
            "prompt": "A beautiful sunset over the ocean", "width": 1024, "height": 1024, "num_inference_steps": 28,
            "guidance_scale": 3.5, "seed": 42, "enable_cache_dit": True, "cache_dit_params": {"profile": "balanced"},
        }},
    )

    prompt: Annotated[str, StringConstraints(min_length=1)]
    negative_prompt: str | None = None
    width: _Pixels | None = Field(None, description="Pixels; the model's own default where left out.")
    height: _Pixels | None = Field(None, description="Pixels; the model's own default where left out.")
    num_inference_steps: int | None = Field(None, ge=1, le=10_000, description="Denoising steps.")
    guidance_scale: _Scale | None = None
    guidance_scale_2: _Scale | None = Field(None, description="Of the low-noise expert.")
    true_cfg_scale: _Scale | None = Field(None, description="Classifier-free guidance of distilled models.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Drawn once for all ranks where left out.")
    generator_device: Literal["cpu", "cuda"] = Field(
        "cpu", description="Where noise is drawn; on the CPU all ranks and machines draw the same."
    )
    n: int = Field(1, ge=1, le=10, description="Pictures or videos; their seeds count up.")
    num_frames: int | None = Field(None, ge=1, le=10_000, description="Of a video.")
    fps: int | None = Field(None, ge=1, le=240, description="Frames a second of a video.")
    output_format: Literal["png", "jpeg", "webp"] = Field("png", description="Of pictures.")
    enable_cache_dit: bool | None = Field(None, description="Whether to cache; the server decides where left out.")
    cache_dit_params: dict[str, Any] | None = Field(None, description="Any cache setting, `secondary`, `profile`.")
    profile: str | None = Field(None, description="Shorthand for `cache_dit_params.profile`.")
    warmup: bool = Field(False, description="Run the request for its shape only: no pictures, not counted.")


class GenerateResponse(BaseModel):
    """What came out, how long it took and what the cache did."""

    id: str
    created: int = Field(default_factory=lambda: int(time.time()), description="Seconds since 1970.")
    images: list[str] = Field([], description="Base64 pictures.")
    videos: list[str] = Field([], description="Base64 mp4.")
    seed: int = Field(description="Of the first output; the same request with it gives the same again.")
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    time_cost: float = Field(description="Seconds in the server, waiting included.")
    inference_time_s: float | None = Field(None, description="Seconds in the worker.")
    peak_memory_mb: float | None = None
    cache_stats: dict[str, Any] | None = Field(None, description="The report that other answers carry as `cache_dit`.")
    notes: list[str] = Field([], description="Arguments that were left out, and why.")
