"""Measures requests in the real host, each once: results are kept on disk."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import quality
from .engine import Engine, Outcome
from .store import Store
from .trajectory import Trajectories, combine, products

SHEET = 6
"""Pictures are kept of so many prompts."""
OFF = {"enable_cache_dit": False}


@dataclass(frozen=True)
class Grid:
    """One number of steps and one size that is tuned for."""

    steps: int
    size: tuple[int, ...]

    @property
    def label(self) -> str:
        """For progress lines."""
        return f"{self.steps} steps {'x'.join(map(str, self.size))}"


@dataclass(frozen=True)
class Prompt:
    """One prompt and the seed of its picture."""

    text: str
    seed: int


class Progress:
    """One line on stderr: what is under way, how many requests were served or found, how long it took."""

    def __init__(self, quiet: bool = False):
        self._quiet = quiet
        self._started = time.monotonic()
        self._live = sys.stderr.isatty()
        self.served = self.found = 0
        self._stage = ""

    def stage(self, text: str) -> None:
        """Begin another part of the work."""
        if not self._quiet:
            spent = time.monotonic() - self._started
            if self._live and self._stage:
                print(file=sys.stderr)
            print(f"[{spent:5.0f} s] {text}", file=sys.stderr, flush=True, end="" if self._live else "\n")
        self._stage = text

    def step(self, *, found: bool) -> None:
        """Count one request."""
        self.served, self.found = self.served + (not found), self.found + found
        if self._live and not self._quiet:
            spent = time.monotonic() - self._started
            line = f"[{spent:5.0f} s] {self._stage}: {self.served} requests served, {self.found} known"
            print(f"\r{line}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line; say how much was done."""
        if not self._quiet:
            spent = time.monotonic() - self._started
            lead = "\n" if self._live else ""
            print(f"{lead}[{spent:5.0f} s] {self.served} requests served, {self.found} known", file=sys.stderr)


class Evaluator:
    """Serves requests through the host and compares them with the uncached ones.

    Args:
        request: sampling parameters that all requests share.
    """

    def __init__(self, engine: Engine, store: Store, request: Mapping[str, Any], progress: Progress):
        self._engine, self._store, self._request, self._progress = engine, store, dict(request), progress

    def _sampling(self, prompt: Prompt, grid: Grid, more: Mapping[str, Any]) -> dict[str, Any]:
        width, height, *frames = grid.size
        size = {"width": width, "height": height, **({"num_frames": frames[0]} if frames else {})}
        return {
            **self._request, "prompt": prompt.text, "seed": prompt.seed, "num_inference_steps": grid.steps,
            **size, **more,
        }

    def reference(self, prompt: Prompt, grid: Grid) -> dict[str, Any]:
        """Picture, latents and time of the uncached request."""
        request = self._sampling(prompt, grid, OFF)
        key = self._store.key({"reference": request})
        if (found := self._store.get(key)) is None:
            outcome = self._engine.run(request)
            figures = {"denoising_s": outcome.report["denoising_s"], "seconds": outcome.seconds}
            self._store.put(key, figures, {"latents": outcome.latents, "picture": outcome.picture})
            found = {**figures, "latents": outcome.latents, "picture": outcome.picture}
            self._progress.step(found=False)
        else:
            self._progress.step(found=True)
        return found

    def trajectories(self, prompts: Sequence[Prompt], grid: Grid) -> Trajectories:
        """What the search needs of the uncached trajectories of ``prompts``."""
        found = [self._trajectory(prompt, grid) for prompt in prompts]
        return Trajectories(
            timesteps=found[0]["timesteps"], change=np.mean([each["change"] for each in found], axis=0),
            gram=np.stack([each["gram"] for each in found]), peak=np.array([each["peak"] for each in found]),
            starts=frozenset(found[0]["starts"]),
            parts=tuple(np.mean([each["parts"] for each in found], axis=0).tolist()),
        )

    def _trajectory(self, prompt: Prompt, grid: Grid) -> dict[str, Any]:
        row = {"steps": grid.steps, "mask": "1" * grid.steps}
        knobs = {"forecast": "output", "schedules": [row], "steps_computation_policy": "static", "max_warmup_steps": 0}
        request = self._sampling(prompt, grid, {"enable_cache_dit": True, "cache_dit_params": knobs})
        key = self._store.key({"trajectory": request, "format": 2})
        found = self._store.get(key)
        self._progress.step(found=found is not None)
        if found is None:
            outcome = self._engine.run(request)
            velocity, change, timesteps, parts = read_trajectory(outcome, grid.steps)
            counts = [each["steps"] for each in outcome.report["transformers"].values()]
            starts = [0, *np.cumsum(counts)[:-1].tolist()] if sum(counts) == grid.steps else [0]
            figures = {"peak": float(np.ptp(outcome.latents)), "starts": starts, "parts": parts}
            arrays = {"gram": products(velocity), "change": change, "timesteps": timesteps}
            self._store.put(key, figures, arrays)
            found = {**figures, **arrays}
        return found

    def measure(
        self, prompt: Prompt, grid: Grid, more: Mapping[str, Any], *, pictures: bool, keep: bool = False,
        steps: int | None = None,
    ) -> dict[str, Any]:
        """One request against the uncached one of ``grid``.

        Args:
            more: sampling parameters of the request.
            pictures: compare the pictures, not only the latents.
            keep: with the picture itself.
            steps: take fewer steps than the grid's.
        """
        asked = grid if steps is None else Grid(steps, grid.size)
        request = self._sampling(prompt, asked, more)
        key = self._store.key({"measure": request, "of": grid.steps, "pictures": pictures, "keep": keep})
        found = self._store.get(key)
        if found is not None:
            self._progress.step(found=True)
            return found
        uncached = self.reference(prompt, grid)
        outcome = self._engine.run(request)
        figures = _figures(uncached, outcome, pictures)
        arrays = {"picture": outcome.picture} if keep else {}
        self._store.put(key, figures, arrays)
        self._progress.step(found=False)
        return {**figures, **arrays}


def _figures(uncached: Mapping[str, Any], outcome: Outcome, pictures: bool) -> dict[str, Any]:
    report = outcome.report
    figures = {
        "latent_psnr": quality.latent_psnr(uncached["latents"], outcome.latents),
        "computed": report["computed_steps"], "enabled": report["enabled"], "reason": report["reason"],
        "denoising_s": report["denoising_s"], "seconds": outcome.seconds,
    }
    if pictures:
        figures["psnr"] = quality.psnr(uncached["picture"], outcome.picture)
        if "ssim" in quality.available():
            figures["ssim"] = quality.ssim(uncached["picture"], outcome.picture)
    return figures


def read_trajectory(outcome: Outcome, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[float, ...]]:
    """Velocity (B, T, N), its part in the latents' change (T,), timesteps and the branches' parts of a recording."""
    timesteps = outcome.tensors["timesteps"][:steps]
    by_branch: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for name, value in outcome.tensors.items():
        kind, _, place = name.partition("/")
        if kind == "output":
            _, branch, step = place.rsplit("/", 2)
            went_in = outcome.tensors[f"input/{place}"]
            by_branch.setdefault(branch, {})[int(step)] = (went_in.ravel(), value.ravel())
    whole = {branch: each for branch, each in by_branch.items() if len(each) == steps}
    if not whole:
        raise ValueError(f"no branch ran on all {steps} steps")
    order = sorted(whole, key=lambda branch: (branch != "cond", branch))
    outputs = {branch: np.stack([whole[branch][step][1] for step in range(steps)]) for branch in order}
    inputs = np.stack([whole[order[0]][step][0] for step in range(steps)])
    velocity, change, parts = combine(outputs, inputs, outcome.latents.ravel(), timesteps)
    return velocity, change, timesteps, parts
