"""A running server as the host of a comparison: pictures and videos over its OpenAI-compatible API."""

from __future__ import annotations

import base64
import io
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluation import quality
from .hosts import HostError
from .worker import save

_IMAGES, _VIDEOS = "/v1/images/generations", "/v1/videos"


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
        video: use the video API.
        timeout: seconds that a request may take.

    Raises:
        HostError: nothing answers there.
    """

    start_s: float | None = None

    def __init__(self, url: str, timeout: float, *, video: bool):
        import httpx

        self._client = httpx.Client(base_url=url.rstrip("/"), timeout=timeout)
        self._timeout, self._run = timeout, self._video if video else self._image
        try:
            self._client.get("/health").raise_for_status()
        except httpx.HTTPError as error:
            raise HostError(f"{url}: {error}") from None

    def run(self, request: Mapping[str, Any], picture: Path | None = None) -> dict[str, Any]:
        """One request's reply in the form of worker.py; the server says nothing of memory."""
        import httpx

        body = dict(request)
        body["size"] = f"{body.pop('width')}x{body.pop('height')}"
        try:
            return self._run(body, picture)
        except httpx.HTTPStatusError as error:
            return {"error": f"{error.response.status_code}: {error.response.text[:300]}"}
        except httpx.HTTPError as error:
            raise HostError(f"{type(error).__name__}: {error}") from None

    def _image(self, body: dict[str, Any], picture: Path | None) -> dict[str, Any]:
        started = time.perf_counter()
        answer = self._client.post(_IMAGES, json=body | {"response_format": "b64_json", "output_format": "png"})
        seconds = time.perf_counter() - started
        answer.raise_for_status()
        found = answer.json()
        if picture is not None:
            from PIL import Image

            data = io.BytesIO(base64.b64decode(found["data"][0]["b64_json"]))
            save(_frames(Image.open(data).convert("RGB")), picture)
        return _reply(seconds, found)

    def _video(self, body: dict[str, Any], picture: Path | None) -> dict[str, Any]:
        started = time.perf_counter()
        answer = self._client.post(_VIDEOS, json=body)
        answer.raise_for_status()
        job = answer.json()
        while job["status"] not in ("completed", "failed"):
            if time.perf_counter() - started > self._timeout:
                raise HostError(f"no video within {self._timeout:g} s")
            time.sleep(0.05)
            job = self._client.get(f"{_VIDEOS}/{job['id']}").json()
        seconds = time.perf_counter() - started
        if job["status"] == "failed":
            return {"error": str(job.get("error") or "failed")}
        if picture is not None:
            content = self._client.get(f"{_VIDEOS}/{job['id']}/content")
            content.raise_for_status()
            with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
                Path(file.name).write_bytes(content.content)
                save(_frames(quality.load(file.name)), picture)
        return _reply(seconds, job)

    def close(self) -> None:
        """Let go of the connection; the server stays."""
        self._client.close()


def _frames(picture: Any) -> Any:
    import numpy as np

    frames = np.asarray(picture)
    return frames if frames.ndim == 4 else frames[None]


def _reply(seconds: float, answer: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "seconds": seconds, "metrics": {"cache_dit": answer.get("cache_dit")},
        "peak_memory_mb": answer.get("peak_memory_mb"), "peak_rss_mb": None, "error": None,
    }
