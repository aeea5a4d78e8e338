"""``POST /generate``: one request, its pictures or videos in the answer, on the host's own way to the workers."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import inspect
import secrets
import time
from contextlib import AsyncExitStack
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request

from ..errors import SettingError, nearest, one_line, refusal_in
from ..integration.request import WARMUP
from . import responses
from .generate_models import TEXTS, GenerateRequest, GenerateResponse
from .validation import RESPONSES, LoggedError, OneLineRoute, misplaced

router = APIRouter(tags=["cache_dit"], route_class=OneLineRoute)

_HANDLED = {"prompt", "n", "seed", "output_format", "cache_dit_params", "profile", "warmup"}
_PIPELINE_ARGUMENTS = ("negative_prompt", "guidance_scale", "guidance_scale_2", "true_cfg_scale", "num_frames")
_SEED_RANGE = 2**32
_EXTENSIONS = {"png": "png", "jpeg": "jpg", "webp": "webp"}


@router.post("/generate", summary="Generate pictures or a video; the answer carries them", responses=RESPONSES)
async def generate(body: GenerateRequest, raw_request: Request) -> GenerateResponse:
    """Runs one request and answers with base64 pictures (or videos), the seed, the time and the cache's report.

    A setting that cannot be used is answered with 400; arguments that the model does not take are left out with a
    note. With ``warmup`` the request runs as any other, answers without pictures and is not in the totals.
    """
    from sglang.multimodal_gen.configs.sample.sampling_params import generate_request_id
    from sglang.multimodal_gen.runtime.entrypoints.openai.utils import temp_dir_if_disabled
    from sglang.multimodal_gen.runtime.server_args import get_global_server_args

    started = time.perf_counter()
    server_args = get_global_server_args()
    video = _is_video(server_args)
    seed = secrets.randbelow(_SEED_RANGE) if body.seed is None else body.seed
    taken = await asyncio.to_thread(_pipeline_arguments, server_args.model_path)
    arguments, notes = fit(body, video=video, taken=taken, extra=_declared(server_args, video))
    async with AsyncExitStack() as resources:
        folder = resources.enter_context(temp_dir_if_disabled(None))
        request_id = generate_request_id()
        batch = _prepare(request_id, body, arguments | {"seed": seed}, folder, video, raw_request)
        if body.warmup:
            batch.extra[WARMUP] = True
        outputs, result = await _run(batch, video, resources)
    return GenerateResponse(
        seed=seed, width=batch.width, height=batch.height, num_inference_steps=batch.num_inference_steps,
        time_cost=round(time.perf_counter() - started, 4), notes=notes,
        **({} if body.warmup else {"videos" if video else "images": outputs}),
        **_common(request_id, result, counted=not body.warmup),
    )


def fit(
    body: GenerateRequest, *, video: bool, taken: frozenset[str] | None, extra: frozenset[str]
) -> tuple[dict[str, Any], list[str]]:
    """What of ``body`` goes on to the model, and a note for each argument that does not.

    Args:
        video: whether the server's model draws videos.
        taken: arguments that the model's pipeline takes, None where unknown.
        extra: further arguments that the model declares.
    """
    given = {name: getattr(body, name) for name in body.model_fields_set & set(GenerateRequest.model_fields)}
    arguments = {name: value for name, value in given.items() if name not in _HANDLED and value is not None}
    arguments["generator_device"] = body.generator_device
    if (error := misplaced(body.model_extra or {}, extra)) is not None:
        raise HTTPException(status_code=400, detail=str(error))
    notes = []
    for name in ("num_frames", "fps"):
        if name in arguments and not video:
            del arguments[name]
            notes.append(f"{name} was left out: this model draws pictures")
    for name in _PIPELINE_ARGUMENTS:
        if name in arguments and taken is not None and name not in taken:
            del arguments[name]
            notes.append(f"{name} was left out: the model's pipeline does not take it")
    for name, value in sorted((body.model_extra or {}).items()):
        if name in extra and name not in TEXTS and _has_text(value):
            notes.append(f"{name} was left out: text in it may name a file, and files are not taken here")
        elif name in extra:
            arguments[name] = value
        else:
            near = nearest(name, [*GenerateRequest.model_fields, *extra])
            notes.append(f"{name} was left out: this model has no such argument"
                         + (f"; did you mean {near!r}?" if near else ""))
    arguments["cache_dit_params"] = _cache_params(body)
    return arguments, notes


def _has_text(value: Any) -> bool:
    """Whether there is a string anywhere in a value of JSON; names of fields are none."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            return True
        waiting += each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
    return False


def _cache_params(body: GenerateRequest) -> dict[str, Any] | None:
    if body.profile is None:
        return body.cache_dit_params
    params = dict(body.cache_dit_params or {})
    if params.setdefault("profile", body.profile) != body.profile:
        error = SettingError("profile", body.profile, "request", "cache_dit_params names another profile, give one")
        raise HTTPException(status_code=400, detail=str(error))
    return params


def _is_video(server_args: Any) -> bool:
    from sglang.multimodal_gen.configs.task_type import DataType

    kind = server_args.pipeline_config.task_type.data_type()
    if kind not in (DataType.IMAGE, DataType.VIDEO):
        raise HTTPException(status_code=400, detail=f"this server makes {kind.name.lower()}, not pictures or videos")
    return kind == DataType.VIDEO


def _declared(server_args: Any, video: bool) -> frozenset[str]:
    """Arguments that the model declares beyond the common ones; paths of files are never taken over HTTP."""
    from sglang.multimodal_gen.runtime.entrypoints.openai import utils

    params = utils.resolve_sampling_params_cls(server_args)
    names = utils.get_sampling_request_extra_fields(params, "video" if video else "image")
    if video:
        # Further names are for the model's own lowering.
        names |= getattr(params, "video_request_extra_fields", frozenset)()
    common = {"max_sequence_length", "flow_shift", "cfg_gate_step", "quality"} & _constructed(params)
    return frozenset(name for name in names | common if "path" not in name)


def _constructed(params: type) -> set[str]:
    """What sampling parameters are made from."""
    return {field.name for field in dataclasses.fields(params) if field.init}


@cache
def _pipeline_arguments(model_path: str) -> frozenset[str] | None:
    """Arguments of the diffusers pipeline that the model names, None where there is none to ask."""
    import diffusers
    from sglang.multimodal_gen.runtime.utils.hf_diffusers_utils import maybe_download_model_index

    try:
        pipeline = getattr(diffusers, maybe_download_model_index(model_path)["_class_name"])
        parameters = inspect.signature(pipeline.__call__).parameters.values()
    except Exception:
        # No index, no such class, or one whose own imports fail: nothing is known, nothing is left out.
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)


def _prepare(
    request_id: str, body: GenerateRequest, arguments: dict[str, Any], folder: str, video: bool, raw_request: Request
) -> Any:
    from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
    from sglang.multimodal_gen.configs.task_type import DataType
    from sglang.multimodal_gen.runtime.entrypoints.openai import protocol, utils
    from sglang.multimodal_gen.runtime.entrypoints.utils import prepare_request
    from sglang.multimodal_gen.runtime.server_args import get_global_server_args
    from sglang.srt.observability.trace import extract_trace_headers

    server_args = get_global_server_args()
    name = f"{request_id}.mp4" if video else f"{request_id}.{_EXTENSIONS[body.output_format]}"
    arguments = arguments | {
        "prompt": body.prompt, "num_outputs_per_prompt": body.n, "output_path": folder, "output_file_name": name,
        "request_data_type": DataType.VIDEO if video else DataType.IMAGE, "output_quality": "default",
    }
    try:
        if video:
            model = utils.resolve_sampling_params_cls(server_args)
            extra = {name: value for name, value in arguments.items() if name in (body.model_extra or {})}
            request = protocol.VideoGenerationsRequest(prompt=body.prompt, **extra)
            alone = extra.keys() - _constructed(model)
            arguments = {name: value for name, value in arguments.items() if name not in alone}
            arguments = model.lower_video_request_kwargs(request, arguments)
        else:
            # Hosts before 0.5.23 hand pictures back as files only.
            in_memory = hasattr(SamplingParams, "return_image_bytes")
            arguments |= {"num_frames": 1} | ({"save_output": False, "return_image_bytes": True} if in_memory else {})
        sampling = utils.build_sampling_params(request_id, **arguments)
        return prepare_request(
            server_args=server_args, sampling_params=sampling,
            external_trace_header=extract_trace_headers(raw_request.headers),
        )
    except (TypeError, ValueError) as error:
        raise HTTPException(status_code=400, detail=one_line(error)) from None


async def _run(batch: Any, video: bool, resources: AsyncExitStack) -> tuple[list[str], Any]:
    """Base64 outputs, and the worker's result."""
    from sglang.multimodal_gen.runtime.entrypoints.openai.utils import process_generation_batch
    from sglang.multimodal_gen.runtime.scheduler_client import async_scheduler_client

    group = None
    if video:
        sampling = batch.sampling_params
        resources.push_async_callback(asyncio.to_thread, sampling.cleanup_video_request, batch)
        await asyncio.to_thread(sampling.prepare_video_request_for_queue, batch)
        group = sampling.expand_video_request_outputs_for_queue(batch)
    try:
        paths, result = await process_generation_batch(async_scheduler_client, batch, scheduler_batches=group)
    except (RuntimeError, TimeoutError) as error:
        if (reason := refusal_in(str(error))) is not None:
            # The worker has logged it.
            raise LoggedError(status_code=400, detail=reason) from None
        raise HTTPException(status_code=500, detail=one_line(error)) from None
    return await asyncio.to_thread(_encoded, getattr(result, "output_image_bytes", None) or paths), result


def _encoded(outputs: list[Any]) -> list[str]:
    """Base64 of contents, or of the files that paths name."""
    contents = [output if isinstance(output, bytes) else Path(output).read_bytes() for output in outputs]
    return [base64.b64encode(content).decode("ascii") for content in contents]


def _common(request_id: str, result: Any, *, counted: bool) -> dict[str, Any]:
    """Times, memory and the report, as the host's own answers give them."""
    from sglang.multimodal_gen.runtime.entrypoints.openai.utils import add_common_data_to_response

    if not counted:
        return {"id": request_id, "cache_stats": responses.report_of(result)}
    common = add_common_data_to_response({}, request_id=request_id, result=result)
    found = {name: common.get(name) for name in ("id", "inference_time_s", "peak_memory_mb")}
    return found | {"cache_stats": common.get(responses.FIELD)}
