"""Stages of the host with a denoising loop of their own.

Most never ask for caching. Where such a loop calls the transformer once for each step and branch, the plugin opens
the request itself and names the forwards. Otherwise the stage is declined, and the report says why. Others ask,
but name the step or the branch of a forward in a way of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..cache.runtime import Identity
from ..report.stats import COND, COND_ONLY
from . import sglang_api

Identify = Callable[[str, Mapping[str, Any]], Identity | None]


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

    identify: Callable[[Any], Identify] | None = None
    refused: str = ""
    asks: bool = False
    refuses: str = ""
    one_step: bool = False


def _by_context(batch: Any) -> Identify:
    """The host's forward context names step and branch."""
    return lambda name, kwargs: sglang_api.forward_identity()


_guided = False


def guided(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around ``Cosmos3DenoisingStage._predict_noise_cfg``: the branches of a step, shared out over the CFG ranks."""
    global _guided
    _guided = True
    try:
        return original(*args, **kwargs)
    finally:
        _guided = False


def _by_cache_key(batch: Any) -> Identify:
    """Cosmos 3: the context names the step, the key of the prompt's cache the branch.

    Under CFG parallelism a step without guidance is the conditional forward on every rank. The ranks must come to
    the same output, and only one of them has run that branch before: each run of such steps has a history of its own.
    """
    apart = sglang_api.runs_branches_apart()
    runs, last = 0, -2

    def identify(name: str, kwargs: Mapping[str, Any]) -> Identity | None:
        nonlocal runs, last
        step, key = sglang_api.forward_step(), str(kwargs.get("cache_key", ""))
        if step is None:
            return None
        branch = COND if key in ("cfg_batched", "") else key
        if not apart or branch != COND or _guided:
            return Identity(branch, step)
        runs, last = runs + (step > last + 1), step
        return Identity(COND_ONLY if runs == 1 else f"{COND_ONLY}_{runs}", step)

    return identify


def _by_run(batch: Any) -> Identify:
    """MiniMax-H3 in ComfyUI: as the context says, for requests of the run that caching was mounted for."""
    prompt = _extra(batch, "comfyui_cond_key")

    def identify(name: str, kwargs: Mapping[str, Any]) -> Identity | None:
        under_way, step = sglang_api.forward_request(), sglang_api.forward_step()
        if step is None or not same_run(under_way, batch):
            return None
        given = _extra(under_way, "comfyui_cond_key")
        return Identity(COND if given == prompt else str(given), step)

    return identify


def same_run(one: Any, other: Any) -> bool:
    """Whether two requests of one step are steps of the same run of ComfyUI."""
    return _extra(one, "comfyui_session_id") == _extra(other, "comfyui_session_id")


def _extra(batch: Any, name: str) -> Any:
    return (getattr(batch, "extra", None) or {}).get(name)


def _by_flag(batch: Any) -> Identify:
    """Wan-Animate 2: the context names the step, a flag of the forward the branch."""

    def identify(name: str, kwargs: Mapping[str, Any]) -> Identity | None:
        step = sglang_api.forward_step()
        return None if step is None else Identity("uncond" if kwargs.get("is_unconditional") else COND, step)

    return identify


def _by_count(batch: Any) -> Identify:
    """Sana-Video 2: one forward a step for both branches, and nothing names the step."""
    calls = 0

    def identify(name: str, kwargs: Mapping[str, Any]) -> Identity:
        nonlocal calls
        calls += 1
        return Identity(COND, calls - 1)

    return identify


def _by_step(batch: Any) -> Identify:
    """LTX-2: the context names the step alone; all branches are one forward."""

    def identify(name: str, kwargs: Mapping[str, Any]) -> Identity | None:
        step = sglang_api.forward_step()
        return None if step is None else Identity(COND, step)

    return identify


def _by_remaining(batch: Any) -> Identify:
    """Ideogram 4: the context names the steps that remain; the second transformer is the unconditional branch."""
    last = num_steps(batch) - 1

    def identify(name: str, kwargs: Mapping[str, Any]) -> Identity | None:
        remaining = sglang_api.forward_step()
        return None if remaining is None else Identity("uncond" if name == "transformer_2" else COND, last - remaining)

    return identify


_FEW = "a distilled model of a few steps, sampled in a loop of its own"
_CHUNKS = "it samples chunk by chunk, and what each block keeps is read by the next chunk"

OWN_LOOPS: Mapping[str, OwnLoop] = {
    "Cosmos3DenoisingStage": OwnLoop(identify=_by_cache_key),
    "SanaWMDenoisingStage": OwnLoop(identify=_by_context),
    "WanAnimate2DenoisingStage": OwnLoop(identify=_by_flag),
    "SanaVideo2DenoisingStage": OwnLoop(identify=_by_count),
    "LTX2DenoisingStage": OwnLoop(identify=_by_step, asks=True, refuses="it starts from an image"),
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


def num_steps(batch: Any) -> int:
    """Steps that the loop of ``batch`` takes."""
    timesteps = getattr(batch, "timesteps", None)
    return int(batch.num_inference_steps) if timesteps is None else len(timesteps)
