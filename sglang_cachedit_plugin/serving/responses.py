"""The field ``cache_dit`` of image, edit and video answers, and the fields of requests as OpenAPI describes them."""

from __future__ import annotations

from typing import Any

from fastapi import Depends
from fastapi.routing import APIRoute
from pydantic.fields import FieldInfo

from ..config.json_schema import request_schema
from ..report.stats import reports_of
from . import state, validation

FIELD = "cache_dit"
_ANNOTATION = dict[str, Any] | None
_GENERATES = ("/v1/images/generations", "/v1/images/edits", "/v1/videos")


def declare() -> None:
    """Add the field to the host's response models, and the check of misspelt fields to its addresses.

    Before routes are built from them.
    """
    from sglang.multimodal_gen.runtime.entrypoints.openai import image_api, protocol, video_api

    for model in (protocol.ImageResponse, protocol.VideoResponse):
        model.__annotations__[FIELD] = _ANNOTATION
        model.__pydantic_fields__[FIELD] = FieldInfo(
            annotation=_ANNOTATION, default=None, description="What the cache did for this request."
        )
        model.model_rebuild(force=True)
    protocol.VideoListResponse.model_rebuild(force=True)
    known = frozenset({*protocol.ImageGenerationsRequest.model_fields, *protocol.VideoGenerationsRequest.model_fields})
    check = Depends(validation.Fields(known))
    for route in (*image_api.router.routes, *video_api.router.routes):
        if isinstance(route, APIRoute) and route.path in _GENERATES and "POST" in route.methods:
            # A second application of this process brings the check of the first one along.
            route.dependencies[:] = [
                each for each in route.dependencies if not isinstance(each.dependency, validation.Fields)
            ] + [check]


def describe_requests(document: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI document with our fields in the bodies of the host's addresses, whose models do not declare them."""
    for path in _GENERATES:
        content = document["paths"].get(path, {}).get("post", {}).get("requestBody", {}).get("content", {})
        for each in content.values():
            name = each["schema"].get("$ref", "").rpartition("/")[2]
            body = document["components"]["schemas"].get(name, each["schema"])
            body.setdefault("properties", {}).update(request_schema())
    return document


def add_report(answer: dict[str, Any], response: dict[str, Any], request_id: str, result: Any) -> dict[str, Any]:
    """After ``add_common_data_to_response``: the request's report, where a worker wrote one."""
    server = state.current()
    report = report_of(result) or server.apart.pop(request_id, None)
    if report is None:
        return answer
    server.count(request_id, report)
    return answer | {FIELD: report}


def remember(server: Any, msg: dict[str, Any], role: Any) -> None:
    """Before ``DiffusionServer._handle_transfer_done``: the report of a denoiser that runs apart.

    The denoiser hands it on as an extra of the request; the decoder's result, which is answered, has none.
    """
    report = (msg.get("scalar_fields") or {}).get(f"_extra_{FIELD}")
    if report is not None:
        state.current().remember(msg["request_id"], report)


def restore(result: Any, data: dict[str, Any] | None) -> Any:
    """After ``_deserialize_request_metrics``: metrics that came as a dictionary keep the report."""
    if result is not None and data is not None and data.get(FIELD) is not None:
        result.cache_dit = data[FIELD]
    return result


def report_of(result: Any) -> dict[str, Any] | None:
    """The report of a worker's result; outputs that ran one by one are listed under ``outputs``."""
    reports = reports_of(result)
    if not reports:
        return None
    return reports[0] if len(reports) == 1 else reports[0] | {"outputs": reports}
