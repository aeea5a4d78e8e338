"""Classes of diffusers. Those without a row are looked up in cache-dit's register."""

from __future__ import annotations

from .row import AdapterRow

DIFFUSERS: dict[str, AdapterRow] = {}
