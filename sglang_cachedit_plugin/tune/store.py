"""Evaluations on disk: what was measured once is not measured again, so a run can be interrupted and resumed."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def fingerprint(model_path: str, **facts: Any) -> dict[str, Any]:
    """What an evaluation depends on besides its request: the model's files and versions.

    Configuration files count with their contents, all others with name, size and time of change.
    """
    digest = hashlib.sha256()
    root = Path(model_path)
    for path in sorted(each for each in root.rglob("*") if each.is_file()):
        digest.update(str(path.relative_to(root)).encode())
        stat = path.stat()
        small = path.suffix == ".json" and stat.st_size < 1 << 20
        digest.update(path.read_bytes() if small else f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return {"model": digest.hexdigest(), **facts}


class Store:
    """One folder of results, each under the hash of what it depends on.

    Args:
        folder: made where it is missing.
        facts: see ``fingerprint``.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]):
        self.folder = folder
        self._facts = dict(facts)
        folder.mkdir(parents=True, exist_ok=True)

    def key(self, request: Mapping[str, Any]) -> str:
        """Name of a request's result."""
        text = json.dumps([self._facts, request], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def get(self, key: str) -> dict[str, Any] | None:
        """Figures and arrays of a result, None where it is not known or was cut off."""
        path = self.folder / f"{key}.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                found: dict[str, Any] = {name: file[name] for name in file.files}
            return {**json.loads(str(found.pop("figures"))), **found}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def put(self, key: str, figures: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Write a result, at once or not at all."""
        unfinished = self.folder / f".{key}.{os.getpid()}"
        with unfinished.open("wb") as file:
            np.savez(file, figures=np.array(json.dumps(figures)), **arrays)
        os.replace(unfinished, self.folder / f"{key}.npz")
