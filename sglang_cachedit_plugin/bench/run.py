"""The run itself: hosts started, requests interleaved, every reply written down."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..evaluation.host_process import HostError
from .variants import PLUGIN, UNCACHED, Variant, changed, steady

if TYPE_CHECKING:
    from tqdm import tqdm


class Host(Protocol):
    """What answers requests: a process or a server."""

    start_s: float | None

    def run(self, request: Mapping[str, Any], picture: Path | None = None) -> dict[str, Any]:
        """One request's reply."""

    def close(self) -> None:
        """End it."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every variant is asked to do.

    Args:
        prompts: each is drawn ``repeat`` times.
        request: sampling parameters that all requests share.
        seed: of the first prompt; each next one adds 1.
        warmup: untimed requests after the first one.
        switches: pairs of requests with one knob changed and changed back.
        pictures: folder for one picture of each variant and prompt.
    """

    prompts: Sequence[str]
    request: Mapping[str, Any]
    seed: int
    repeat: int
    warmup: int
    switches: int
    pictures: Path


@dataclass
class Seat:
    """One variant's place at a host."""

    variant: Variant
    host: Host | None
    shared: bool = False
    start_s: float | None = None
    failure: str | None = None
    records: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, work: Work, index: int, phase: str, settings: Mapping[str, Any] | None = None,
            picture: Path | None = None) -> None:
        """One request; its reply, or why there is none, goes to the records."""
        record: dict[str, Any] = {"variant": self.variant.name, "phase": phase, "prompt": index}
        if self.host is None:
            reply = {"error": self.failure}
        else:
            caching = self.variant.request()
            if self.variant.kind == UNCACHED and self.shared:
                caching = {"enable_cache_dit": False}
            if settings is not None:
                caching = {"enable_cache_dit": True, "cache_dit_params": dict(settings)}
            request = {**work.request, "prompt": work.prompts[index], "seed": work.seed + index, **caching}
            try:
                reply = self.host.run(request, picture)
            except HostError as error:
                self.failure = str(error)
                self.close()
                reply = {"error": self.failure}
        self.records.append(record | reading(reply))

    def close(self) -> None:
        """End the host, unless others use it."""
        if self.host is not None and not self.shared:
            self.host.close()
        self.host = None


def reading(reply: Mapping[str, Any]) -> dict[str, Any]:
    """A reply's figures, those that it has."""
    if reply.get("error"):
        return {"error": reply["error"]}
    metrics = reply.get("metrics") or {}
    report = metrics.get("cache_dit") or {}
    enabled = report.get("enabled")
    denoising, steps = _denoising(metrics, report), metrics.get("steps") or None
    return {
        "error": None,
        "seconds": reply["seconds"],
        "denoising_s": denoising,
        "steps_ms": steps,
        "setup_s": denoising - sum(steps) / 1000.0 if steps and denoising is not None else None,
        "enabled": enabled,
        "computed": report.get("computed_steps") if enabled else None,
        "cached": report.get("cached_steps") if enabled else None,
        "reason": report.get("reason") if report else None,
        "peak_memory_mb": reply.get("peak_memory_mb"),
        "peak_rss_mb": reply.get("peak_rss_mb"),
    }


def _denoising(metrics: Mapping[str, Any], report: Mapping[str, Any]) -> float | None:
    """Seconds of the host's denoising stages; of the plugin's report where the host names none."""
    stages = metrics.get("stages") or {}
    named = [name for name in metrics.get("denoising_stages") or () if name in stages]
    named = named or [name for name in stages if name == "DiffusersExecutionStage"]
    return sum(stages[name] for name in named) / 1000.0 if named else report.get("denoising_s")


def requests_of(variants: Sequence[Variant], work: Work) -> int:
    """How many requests a run makes."""
    each = 1 + work.warmup + work.repeat * len(work.prompts)
    switching = sum(variant.kind != UNCACHED for variant in variants)
    return each * len(variants) + 2 * work.switches * switching


def run(
    variants: Sequence[Variant], work: Work, start: Callable[[Variant], Host], *, hosts: str = "each",
) -> list[Seat]:
    """Every variant's records.

    Args:
        start: starts the host of a variant; raises HostError.
        hosts: ``each`` variant has a process and turns are taken by request; ``shared``: the uncached one and the
            plugin's share the plugin's process, turns likewise; ``one``: one process after another.
    """
    from tqdm import tqdm

    groups = [[variant] for variant in variants]
    if hosts == "shared":
        own = [variant for variant in variants if variant.kind in (UNCACHED, PLUGIN)]
        groups = [own, *([variant] for variant in variants if variant not in own)]
    bar = "{n_fmt}/{total_fmt} requests |{bar:24}| {elapsed}, about {remaining} left: {desc}"
    with tqdm(total=requests_of(variants, work), bar_format=bar) as progress:
        together = [[group] for group in groups] if hosts == "one" else [groups]
        return [seat for part in together for seat in _together(part, work, start, progress)]


def _together(
    groups: Sequence[Sequence[Variant]], work: Work, start: Callable[[Variant], Host], progress: tqdm
) -> list[Seat]:
    seats: list[Seat] = []
    with ExitStack() as stack:
        for group in groups:
            seats += _seat(group, start, stack)
        _measure(seats, work, progress)
    return seats


def _seat(group: Sequence[Variant], start: Callable[[Variant], Host], stack: ExitStack) -> list[Seat]:
    """Start one host for a group of variants."""
    leader = next((variant for variant in group if variant.kind == PLUGIN), group[0])
    print(f"starting {leader.name} ...", file=sys.stderr, flush=True)
    try:
        host = start(leader)
    except HostError as error:
        return [Seat(variant, None, failure=str(error)) for variant in group]
    stack.callback(host.close)
    return [Seat(variant, host, shared=len(group) > 1, start_s=host.start_s) for variant in group]


def _measure(seats: Sequence[Seat], work: Work, progress: tqdm) -> None:
    def ask(seat: Seat, index: int, phase: str, **more: Any) -> None:
        progress.set_description_str(f"{seat.variant.name}, {phase}")
        seat.ask(work, index, phase, **more)
        progress.update()

    served: set[int] = set()
    for seat in seats:
        # Only a process's very first request is cold.
        ask(seat, 0, "warmup" if id(seat.host) in served else "first")
        served.add(id(seat.host))
        for _ in range(work.warmup):
            ask(seat, 0, "warmup")
    for turn in range(work.repeat):
        for index in range(len(work.prompts)):
            for seat in seats:
                picture = work.pictures / f"{seat.variant.name}-{index}.npy" if turn == 0 else None
                ask(seat, index, "timed", picture=picture)
    for seat in seats:
        if seat.variant.kind != UNCACHED:
            for _ in range(work.switches):
                ask(seat, 0, "switch", settings=changed(seat.variant))
                ask(seat, 0, "switch back", settings=steady(seat.variant))
