"""The field ``cache_dit`` of image, edit and video answers."""

from __future__ import annotations

from typing import Any

from pydantic.fields import FieldInfo

from ..report.stats import reports_of
from . import control
from .history import history

FIELD = "cache_dit"
_ANNOTATION = dict[str, Any] | None


def declare_field() -> None:
    """Add the field to the host's response models, before routes are built from them."""
    from sglang.multimodal_gen.runtime.entrypoints.openai import protocol

    for model in (protocol.ImageResponse, protocol.VideoResponse):
        model.__annotations__[FIELD] = _ANNOTATION
        model.__pydantic_fields__[FIELD] = FieldInfo(
            annotation=_ANNOTATION, default=None, description="What the cache did for this request."
        )
        model.model_rebuild(force=True)
    protocol.VideoListResponse.model_rebuild(force=True)


def add_report(answer: dict[str, Any], response: dict[str, Any], request_id: str, result: Any) -> dict[str, Any]:
    """After ``add_common_data_to_response``: the request's report, where a worker wrote one."""
    report = report_of(result) or _apart.pop(request_id, None)
    if report is None:
        return answer
    control.totals.add(report)
    history.add(request_id, report)
    return answer | {FIELD: report}


_apart: dict[str, dict[str, Any]] = {}
_MOST_APART = 1000


def remember(server: Any, msg: dict[str, Any], role: Any) -> None:
    """Before ``DiffusionServer._handle_transfer_done``: the report of a denoiser that runs apart, by request.

    The denoiser hands it on as an extra of the request; the decoder's result, which is answered, has none.
    """
    report = (msg.get("scalar_fields") or {}).get(f"_extra_{FIELD}")
    if report is None:
        return
    while len(_apart) >= _MOST_APART:
        # Requests that nobody waits for any more.
        _apart.pop(next(iter(_apart)), None)
    _apart[msg["request_id"]] = report


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
