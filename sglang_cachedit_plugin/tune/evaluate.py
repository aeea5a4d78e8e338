"""Measures requests in the real host, each once: results are kept on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation import quality
from ..evaluation.host_process import HostPool, Outcome
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
    """One bar on stderr: what is under way, how many requests were served, how many results were there already."""

    def __init__(self, quiet: bool = False):
        from tqdm import tqdm

        self._bar = tqdm(unit=" requests", disable=quiet, bar_format="[{elapsed}] {desc}: {n} served{postfix}")
        self.found = 0

    def stage(self, text: str) -> None:
        """Begin another part of the work."""
        if not self._bar.disable and not sys.stderr.isatty():
            print(text, file=sys.stderr, flush=True)
        self._bar.set_description_str(text)

    def step(self) -> None:
        """Count one request that was served."""
        self._bar.update()

    def known(self, count: int) -> None:
        """Count requests whose results were there already."""
        self.found += count
        self._bar.set_postfix_str(f"{self.found} known")

    def end(self) -> None:
        """Leave the line; say how much was done."""
        quiet = self._bar.disable
        # A bar that is closed says that it is disabled.
        self._bar.close()
        if not quiet:
            print(f"{self._bar.n} requests served, {self.found} known", file=sys.stderr)


class Evaluator:
    """Serves requests through the host and compares them with the uncached ones.

    Args:
        request: sampling parameters that all requests share.
    """

    def __init__(self, hosts: HostPool, store: Store, request: Mapping[str, Any], progress: Progress):
        self._hosts, self._store, self._request, self._progress = hosts, store, dict(request), progress

    def _sampling(self, prompt: Prompt, grid: Grid, more: Mapping[str, Any]) -> dict[str, Any]:
        width, height, *frames = grid.size
        size = {"width": width, "height": height, **({"num_frames": frames[0]} if frames else {})}
        return {
            **self._request, "prompt": prompt.text, "seed": prompt.seed, "num_inference_steps": grid.steps,
            **size, **more,
        }

    def _all(
        self, asked: Sequence[tuple[str, Mapping[str, Any]]],
        read: Callable[[int, Outcome], tuple[dict[str, Any], dict[str, np.ndarray]]],
    ) -> list[dict[str, Any]]:
        """The kept results of requests; what is not known is served, side by side where there are several hosts.

        Args:
            asked: keys and requests.
            read: figures and arrays to keep, of a request's place in ``asked`` and its outcome.
        """
        found = [self._store.get(key) for key, _ in asked]
        missing = [number for number, each in enumerate(found) if each is None]
        self._progress.known(len(found) - len(missing))
        for number, outcome in zip(missing, self._hosts.run_all([asked[n][1] for n in missing]), strict=True):
            figures, arrays = read(number, outcome)
            self._store.put(asked[number][0], figures, arrays)
            self._progress.step()
            found[number] = {**figures, **arrays}
        return found

    def references(self, prompts: Sequence[Prompt], grid: Grid) -> list[dict[str, Any]]:
        """Picture, latents and time of the uncached requests."""
        requests = [self._sampling(prompt, grid, OFF) for prompt in prompts]

        def read(_: int, outcome: Outcome) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
            figures = {"denoising_s": outcome.report["denoising_s"], "seconds": outcome.seconds}
            return figures, {"latents": outcome.latents, "picture": outcome.picture}

        return self._all([(self._store.key({"reference": request}), request) for request in requests], read)

    def trajectories(self, prompts: Sequence[Prompt], grid: Grid) -> Trajectories:
        """What the search needs of the uncached trajectories of ``prompts``."""
        row = {"steps": grid.steps, "mask": "1" * grid.steps}
        knobs = {"forecast": "output", "schedules": [row], "steps_computation_policy": "static", "max_warmup_steps": 0}
        requests = [
            self._sampling(prompt, grid, {"enable_cache_dit": True, "cache_dit_params": knobs}) for prompt in prompts
        ]
        asked = [(self._store.key({"trajectory": request, "format": 2}), request) for request in requests]
        found = self._all(asked, lambda _, outcome: _recorded(outcome, grid.steps))
        return Trajectories(
            timesteps=found[0]["timesteps"], change=np.mean([each["change"] for each in found], axis=0),
            gram=np.stack([each["gram"] for each in found]), peak=np.array([each["peak"] for each in found]),
            starts=frozenset(found[0]["starts"]),
            parts=tuple(np.mean([each["parts"] for each in found], axis=0).tolist()),
        )

    def measure_all(
        self, prompts: Sequence[Prompt], grid: Grid, more: Mapping[str, Any], *, pictures: bool, keep: int = 0,
        steps: int | None = None,
    ) -> list[dict[str, Any]]:
        """One request for each prompt against the uncached one of ``grid``.

        Args:
            more: sampling parameters of the requests.
            pictures: compare the pictures, not only the latents.
            keep: the first so many with the picture itself.
            steps: take fewer steps than the grid's.
        """
        asked = []
        for number, prompt in enumerate(prompts):
            request = self._sampling(prompt, grid if steps is None else Grid(steps, grid.size), more)
            facts = {"measure": request, "of": grid.steps, "pictures": pictures, "keep": number < keep}
            asked.append((self._store.key(facts), request))
        uncached = self.references(prompts, grid)

        def read(number: int, outcome: Outcome) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
            arrays = {"picture": outcome.picture} if number < keep else {}
            return _figures(uncached[number], outcome, pictures), arrays

        return self._all(asked, read)


def _recorded(outcome: Outcome, steps: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    velocity, change, timesteps, parts = read_trajectory(outcome, steps)
    counts = [each["steps"] for each in outcome.report["transformers"].values()]
    starts = [0, *np.cumsum(counts)[:-1].tolist()] if sum(counts) == steps else [0]
    figures = {"peak": float(np.ptp(outcome.latents)), "starts": starts, "parts": parts}
    return figures, {"gram": products(velocity), "change": change, "timesteps": timesteps}


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
