"""What the host's stages do by themselves: denoising loops of their own, settings, refusals.

Most stages with a loop of their own never ask for caching. Where such a loop calls the transformer once for each step
and branch, the plugin opens the request itself and names the forwards. Otherwise the stage is declined, and the report
says why. Others ask, but name the step or the branch of a forward in a way of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..cache.spec import Identify, Identity
from ..config.settings import KNOBS
from ..config.sources import Layer, Source, Value
from ..errors import Reason
from ..report.stats import COND, COND_ONLY
from . import sglang_api
from .request import WORKER


def _by_context(batch: Any) -> Identify:
    """The host's forward context names the step; the branch is the one that was configured last."""

    def identify(name: str, kwargs: Mapping[str, Any]) -> Identity | None:
        context = sglang_api.forward_context()
        if context is None or context.forward_batch is None:
            return None
        branch = sglang_api.branch_name(WORKER.active.branch or COND)
        if branch in (COND, "uncond"):
            branch = "uncond" if getattr(context.forward_batch, "is_cfg_negative", False) else COND
        return Identity(branch, int(context.current_timestep))

    return identify


def _step() -> int | None:
    context = sglang_api.forward_context()
    return None if context is None else int(context.current_timestep)


@dataclass(frozen=True, kw_only=True)
class OwnLoop:
    """One stage class.

    Args:
        identify: makes what names the forwards of one request, from the host's request.
        refused: why requests of this stage run uncached.
        asks: the stage asks for caching by itself.
        refuses: when a stage that asks keeps a request uncached.
        one_step: each of its requests is one step; caching goes on until the stage unmounts.
    """

    identify: Callable[[Any], Identify] = _by_context
    refused: str = ""
    asks: bool = False
    refuses: str = ""
    one_step: bool = False


def guided(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around ``Cosmos3DenoisingStage._predict_noise_cfg``: the branches of a step, shared out over the CFG ranks."""
    active = WORKER.active
    active.guided = True
    try:
        return original(*args, **kwargs)
    finally:
        active.guided = False


def branch_comes(branch: Any, batch: Any) -> None:
    """Before ``CFGBranch.configure_batch``: the forward of this branch comes next."""
    WORKER.active.branch = branch.name


def _by_cache_key(batch: Any) -> Identify:
    """Cosmos 3: the context names the step, the key of the prompt's cache the branch.

    Under CFG parallelism a step without guidance is the conditional forward on every rank. The ranks must come to
    the same output, and only one of them has run that branch before: each run of such steps has a history of its own.
    """
    apart = sglang_api.runs_branches_apart()
    runs, last = 0, -2

    def identify(name: str, kwargs: Mapping[str, Any]) -> Identity | None:
        nonlocal runs, last
        step, key = _step(), str(kwargs.get("cache_key", ""))
        if step is None:
            return None
        branch = COND if key in ("cfg_batched", "") else key
        if not apart or branch != COND or WORKER.active.guided:
            return Identity(branch, step)
        runs, last = runs + (step > last + 1), step
        return Identity(COND_ONLY if runs == 1 else f"{COND_ONLY}_{runs}", step)

    return identify


def _by_run(batch: Any) -> Identify:
    """MiniMax-H3 in ComfyUI: as the context says, for requests of the run that caching was mounted for."""
    prompt = _extra(batch, "comfyui_cond_key")

    def identify(name: str, kwargs: Mapping[str, Any]) -> Identity | None:
        context = sglang_api.forward_context()
        if context is None or not same_run(context.forward_batch, batch):
            return None
        given = _extra(context.forward_batch, "comfyui_cond_key")
        return Identity(COND if given == prompt else str(given), int(context.current_timestep))

    return identify


def same_run(one: Any, other: Any) -> bool:
    """Whether two requests of one step are steps of the same run of ComfyUI."""
    return _extra(one, "comfyui_session_id") == _extra(other, "comfyui_session_id")


def _extra(batch: Any, name: str) -> Any:
    return (getattr(batch, "extra", None) or {}).get(name)


def _by(branch: Callable[[Mapping[str, Any]], str]) -> Callable[[Any], Identify]:
    """The context names the step, and ``branch`` the branch from the forward's keyword arguments."""

    def identify(name: str, kwargs: Mapping[str, Any]) -> Identity | None:
        step = _step()
        return None if step is None else Identity(branch(kwargs), step)

    return lambda batch: identify


def _by_count(batch: Any) -> Identify:
    """Sana-Video 2: one forward a step for both branches, and nothing names the step."""
    steps = itertools.count()
    return lambda name, kwargs: Identity(COND, next(steps))


def _by_remaining(batch: Any) -> Identify:
    """Ideogram 4: the context names the steps that remain; the second transformer is the unconditional branch."""
    last = num_steps(batch) - 1

    def identify(name: str, kwargs: Mapping[str, Any]) -> Identity | None:
        remaining = _step()
        return None if remaining is None else Identity("uncond" if name == "transformer_2" else COND, last - remaining)

    return identify


_FEW = "a distilled model of a few steps, sampled in a loop of its own"
_CHUNKS = "it samples chunk by chunk, and what each block keeps is read by the next chunk"

OWN_LOOPS: Mapping[str, OwnLoop] = {
    "Cosmos3DenoisingStage": OwnLoop(identify=_by_cache_key),
    "SanaWMDenoisingStage": OwnLoop(),
    "WanAnimate2DenoisingStage": OwnLoop(
        identify=_by(lambda given: "uncond" if given.get("is_unconditional") else COND)
    ),
    "SanaVideo2DenoisingStage": OwnLoop(identify=_by_count),
    # All branches of LTX-2 are one forward.
    "LTX2DenoisingStage": OwnLoop(identify=_by(lambda given: COND), asks=True, refuses="it starts from an image"),
    "Flux3ImageDenoiseStage": OwnLoop(
        asks=True, refuses="its samples pass each block one by one under Ulysses, or its CFG pair runs as two forwards"
    ),
    "MiniMaxH3ComfyUIStepStage": OwnLoop(identify=_by_run, asks=True, one_step=True),
    "Ideogram4DenoisingStage": OwnLoop(identify=_by_remaining, asks=True),
    "DmdDenoisingStage": OwnLoop(refused=_FEW),
    "CausalDMDDenoisingStage": OwnLoop(refused=_CHUNKS),
    "NomasDenoisingStage": OwnLoop(refused=_CHUNKS),
    "CosmosDreamsRolloutStage": OwnLoop(refused=_CHUNKS),
    "Cosmos3SimAutoRolloutStage": OwnLoop(refused=_CHUNKS),
    "SanaWMLTX2RefinerStage": OwnLoop(refused=_FEW),
    "SanaWMChunkedRefinerChainStage": OwnLoop(refused=_FEW),
    "VLAActionDenoisingStage": OwnLoop(refused="an action model: its expert samples robot actions, not pictures"),
    "HeliosChunkedDenoisingStage": OwnLoop(
        refused="its loop says neither the step nor the branch of a forward, and starts anew with each chunk"
    ),
    "MOVADenoisingStage": OwnLoop(refused="it walks the blocks of its video and audio towers itself"),
    "Flux3ActionDenoisingStage": OwnLoop(refused="it calls the parts of the model one by one, not its forward"),
    "Hunyuan3DPaintTexGenStage": OwnLoop(
        refused="its UNet has skip connections over its whole depth and fills its attention's memory on the way"
    ),
    "HunyuanImage3AR": OwnLoop(
        refused="its autoregressive stage runs the denoising loop itself; it can mount stock cache-dit, from the "
        "environment only"
    ),
}


UNCORRECTED: Mapping[str, str] = {
    "Ideogram4DenoisingStage": "it updates its latents itself",
    "JoyEchoDMDDenoisingStage": "it updates its latents itself",
    "LTX2DenoisingStage": "it updates the latents of video and audio itself",
    "MiniMaxH3DenoisingStage": "it updates the latents of video and audio itself",
    "MiniMaxH3ComfyUIStepStage": "the scheduler of ComfyUI makes the steps",
    "Flux3ImageDenoiseStage": "it samples without a scheduler",
    "SanaVideo2DenoisingStage": "it makes a scheduler of its own for each request",
}
"""Stages whose steps do not go through the request's scheduler; the steps that do are corrected all the same."""


def uncorrected(cls: type) -> str | None:
    """Why cached steps of a stage class stay as they are, None where nothing is known."""
    reason = next((UNCORRECTED[base.__name__] for base in cls.__mro__ if base.__name__ in UNCORRECTED), None)
    return None if reason is None else f"{cls.__name__}: {reason}"


def of(cls: type) -> OwnLoop | None:
    """What is known of a stage class or the nearest base that is known."""
    return next((OWN_LOOPS[base.__name__] for base in cls.__mro__ if base.__name__ in OWN_LOOPS), None)


def makes_base_steps(stage: Any) -> bool:
    """Whether all steps of a stage whose class is not known here go through ``_predict_noise_with_cfg``."""
    # Stages that grow the picture have a loop of their own over the base's steps.
    own_loop = sglang_api.overrides(stage, "forward") and not hasattr(stage, "_run_stage_steps")
    methods = ("_denoise", "_run_denoising_loop", "_run_denoising_step", "_predict_noise_with_cfg")
    return not own_loop and not any(sglang_api.overrides(stage, each) for each in methods)


def num_steps(batch: Any) -> int:
    """Steps that the loop of ``batch`` takes."""
    timesteps = getattr(batch, "timesteps", None)
    return int(batch.num_inference_steps) if timesteps is None else len(timesteps)


CONFIGURES = ("_build_cache_dit_config", "_cache_dit_scm_masks")
"""Methods with which a stage replaces the settings that it was given."""


def refusal(stage: Any) -> str:
    """Why a request runs uncached that the stage does not want cached."""
    loop = of(type(stage))
    when = f": {loop.refuses}" if loop is not None and loop.refuses else ""
    return Reason("stage", f"{type(stage).__name__} keeps this request uncached{when}")


def source(stage: Any, steps: int | tuple[int, int], *, wanted: bool) -> Source:
    """The stage's own settings and wish for the request under way.

    Args:
        steps: of the transformer, or of the high and the low noise expert.
        wanted: the stage asks for caching.
    """
    origin = f"stage {type(stage).__name__}"
    enabled = Value(True, origin) if wanted else None
    if not wanted or not any(sglang_api.overrides(stage, name) for name in CONFIGURES):
        return Source(enabled=enabled)
    counts = stage._cache_dit_step_counts(steps)
    _, policy, *masks = stage._cache_dit_scm_masks(*counts)
    layers = [
        _layer(stage, count, mask, policy, bool(second), origin)
        for second, (count, mask) in enumerate(zip(counts, masks, strict=True))
    ]
    return Source(primary=layers[0], secondary=layers[1], enabled=enabled)


def _layer(stage: Any, steps: int | None, mask: Any, policy: str, second: bool, origin: str) -> Layer:
    """The config that the stage builds, where it differs from the one that nobody has touched."""
    if steps is None:
        return {}
    config = stage._build_cache_dit_config(steps, mask, policy, secondary=second)
    if config == sglang_api.untouched_config(steps):
        return {}
    given = {each.name: getattr(config, each.name) for each in fields(config)}
    return {
        name: Value(knob.check(name, given[name], origin), origin)
        for name, knob in KNOBS.items()
        # The number of steps is the request's, not what a mask was written for.
        if name != "num_inference_steps" and given.get(name) is not None
    }
