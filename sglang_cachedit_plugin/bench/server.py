"""A running server as the host of a comparison, through the plugin's ``POST /generate``."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..client import ClientError, ask
from ..evaluation import quality
from ..evaluation.host_process import HostError


def profiles(url: str) -> list[str]:
    """Names of the profiles that the server knows.

    Raises:
        HostError: nothing answers there, or a server without the plugin.
    """
    import httpx

    try:
        answer = httpx.get(url.rstrip("/") + "/v1/cache_dit", timeout=30)
        answer.raise_for_status()
        return list(answer.json()["profiles"])
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise HostError(f"{url}: {error}") from None


class Server:
    """Requests to ``url``; seconds are those of this client.

    Args:
        timeout: seconds that a request may take.
    """

    start_s: float | None = None

    def __init__(self, url: str, timeout: float):
        self._url, self._timeout = url.rstrip("/"), timeout

    def run(self, request: Mapping[str, Any], picture: Path | None = None) -> dict[str, Any]:
        """One request's reply in the form of ``evaluation.worker``; the server says nothing of its processes."""
        try:
            answer = ask(self._url, {**request, "output_format": "png"}, key=None, timeout=self._timeout)
        except ClientError as error:
            return {"error": str(error)}
        if picture is not None:
            picture.parent.mkdir(parents=True, exist_ok=True)
            np.save(picture, _decoded(answer))
        return {
            "seconds": answer["round_trip_s"], "metrics": {"cache_dit": answer.get("cache_stats")},
            "peak_memory_mb": answer.get("peak_memory_mb"), "peak_rss_mb": None, "error": None,
        }

    def close(self) -> None:
        """The server stays."""


def _decoded(answer: Mapping[str, Any]) -> np.ndarray:
    if images := answer.get("images"):
        from PIL import Image

        return np.asarray(Image.open(io.BytesIO(base64.b64decode(images[0]))).convert("RGB"))
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        Path(file.name).write_bytes(base64.b64decode(answer["videos"][0]))
        return quality.load(file.name)
