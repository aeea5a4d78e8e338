"""Random histories of a request on several ranks, whose blocks wait for one another as attention and FSDP do.

Every rank draws the same history. What one rank alone meets is part of it: another branch, another shape, NaN, a
forward too many, an error.
"""

from __future__ import annotations

import datetime
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from sglang_cachedit_plugin.cache.spec import Groups
from tests.unit.blocks import TOKENS, Block, Rig, TwoListsDiT, sample

COUNT, FAILING = 60, 6
"""Histories in which nothing fails, and those in which one rank does."""
BOUND = 2
"""Seconds that the ranks of a failing history wait for each other."""
LIMIT = 20
"""Seconds that a history may take beside that, on a busy machine."""
BRANCHES = ("cond", "uncond", "third", "fourth")


@dataclass
class History:
    """One request.

    Args:
        kind: which ranks share a forward, and which run branches side by side.
        rows: number of CFG ranks.
        events: by step, what happens on which row or rank.
    """

    kind: str
    size: int
    rows: int
    steps: int
    knobs: dict[str, Any]
    events: dict[int, list[tuple[str, int]]] = field(default_factory=dict)
    uneven: bool = False

    def groups(self, rank: int, everyone: Any, own: Any) -> Groups:
        """The groups of ``rank``; ``own``: the ranks of its branch."""
        row = rank * self.rows // self.size
        beside = {"cfg_group": everyone, "cfg_rank": row, "cfg_ranks": self.rows}
        if self.kind == "shards":
            return Groups(forward=everyone)
        if self.kind == "joint":
            return Groups(forward=everyone, **beside)
        return Groups(forward=own, gathered=self.kind == "gathered", **beside)


def draw(number: int, size: int, *, failing: bool) -> History:
    """History ``number``."""
    pick = random.Random(f"{number} {size} {failing}")
    kind = pick.choice(["shards", "joint", "branches", "branches", "branches", "gathered", "gathered"])
    rows = 1 if kind == "shards" else pick.choice([2, size])
    steps = pick.randint(6, 9)
    knobs = {
        "residual_diff_threshold": pick.choice([0.1, 0.3, 0.9, 0.9, 1.0]),
        "max_warmup_steps": pick.choice([0, 1, 2]),
        "max_continuous_cached_steps": pick.choice([-1, 1, 2]),
        "max_cached_steps": pick.choice([-1, 3]),
        "max_accumulated_residual_diff_threshold": pick.choice([None, 0.8]),
        "lockstep": pick.random() < 0.6,
        "cfg_diff_compute_separate": pick.random() < 0.6,
        "verify_ranks": pick.random() < 0.3,
        "forecast": pick.choice(["residual", "residual", "output"]),
    }
    if pick.random() < 0.4:
        knobs["steps_computation_mask"] = (1, *(pick.randint(0, 1) for _ in range(steps - 1)))
        knobs["steps_computation_policy"] = pick.choice(["static", "dynamic"])
    history = History(kind, size, rows, steps, knobs, uneven=kind == "branches" and pick.random() < 0.2)
    happenings = ["branch", "branch", "nan", "longer", "forget", "round"] + (["again"] if kind != "gathered" else [])
    for name in pick.sample(happenings, pick.randint(1, 3)):
        place = pick.randrange(size if name == "nan" else rows)
        history.events.setdefault(pick.randint(1, steps - 1), []).append((name, place))
    if failing:
        history.events.setdefault(pick.randint(0, steps - 1), []).append(("fail", pick.randrange(size)))
    return history


class Spread(TwoListsDiT):
    """Cuts its input into shards of this and of other ranks; every block that runs waits for them.

    What is more than each shard's share falls to the last one.
    """

    def __init__(self, groups: Groups, shard: int, shards: int):
        super().__init__()
        self._shard, self._shards = shard, shards
        self.nan = False
        waiting = {id(each): each for each in (groups.forward, groups.cfg_group if groups.gathered else None) if each}

        def wait(*_: Any) -> None:
            for group in waiting.values():
                dist.all_reduce(torch.zeros(1), group=group)

        for block in self.modules():
            if isinstance(block, Block):
                block.register_forward_pre_hook(wait)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """This rank's shard of the output."""
        last = self._shard == self._shards - 1
        states = hidden_states[:, self._shard * TOKENS : None if last else (self._shard + 1) * TOKENS]
        return super().forward(states * float("nan") if self.nan else states)


@contextmanager
def _counted() -> Iterator[Counter]:
    """Exchanges by kind and ranks."""
    counts: Counter = Counter()
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def counting(name: str) -> Any:
        def call(*args: Any, group: Any, **kwargs: Any) -> Any:
            counts[name, tuple(dist.get_process_group_ranks(group))] += 1
            return originals[name](*args, group=group, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _live(history: History, rank: int, rig: Rig, shards: int) -> None:
    together = history.kind in ("shards", "joint")
    row, extra, step = 0 if together else rank * history.rows // history.size, 0, 0
    branch, happened = BRANCHES[row], set()
    while step < history.steps:
        events = history.events.get(step, []) if step not in happened else []
        happened.add(step)
        rig.model.nan = ("nan", rank) in events
        for block in rig.model.transformer_blocks:
            block.fail = ("fail", rank) in events
        forwards = 1
        for name, place in events:
            # What changes the forward itself is met by all ranks that share it.
            mine = place == row or together
            if name == "branch" and mine:
                branch = BRANCHES[(row + 1) % max(2, history.rows)]
            elif name == "longer" and mine:
                extra = 2
            elif name == "again" and mine:
                forwards = 2
            elif name == "forget":
                rig.mounted.refresh(rig.mounted.request)
            elif name == "round":
                step = 0
        whole = torch.cat([sample(f"{branch} {each}", step, 0.03 * (each + 1)) for each in range(shards)], 1)
        for _ in range(forwards):
            rig.run(branch, step, torch.cat([whole, whole[:, :extra]], 1))
        if history.uneven and row == 0:
            rig.run("perturbed", step, whole)
        step += 1


def _serve(history: History, rank: int, groups: Groups) -> dict[str, Any]:
    shards = dist.get_world_size(groups.forward) if groups.forward is not None else 1
    shard = dist.get_rank(groups.forward) if groups.forward is not None else 0
    rig = Rig(Spread(groups, shard, shards)).begin(history.steps, groups=groups, **history.knobs)
    error, started = None, time.monotonic()
    with _counted() as counts:
        try:
            _live(history, rank, rig, shards)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    return {
        "kind": history.kind, "error": error, "counts": dict(counts), "seconds": time.monotonic() - started,
        "cached": sum(len(branch.cached) for branch in rig.stats.branches.values()),
    }


def faults(ranks: list[dict[str, list[dict[str, Any]]]]) -> list[str]:
    """What is wrong with the histories as the ranks tell them."""
    found = []
    for name in ("whole", "failing"):
        for number, each in enumerate(zip(*(rank[name] for rank in ranks), strict=True)):
            errors = [told["error"] for told in each]
            exchanges = {key for told in each for key in told["counts"]}
            uneven = [key for key in exchanges if len({each[rank]["counts"].get(key, 0) for rank in key[1]}) > 1]
            if name == "whole":
                wrong = any(errors) or uneven
            else:
                late = max(told["seconds"] for told in each) > BOUND + LIMIT
                wrong = late or (uneven and not any(errors))
            if wrong:
                found.append(f"{name} {number}, {each[0]['kind']}: {errors} {uneven}")
    return found


def _made(size: int, timeout: float | None = None) -> dict[int, list[Any]]:
    """Process groups by how many equal slices they make of the world; None for single ranks."""
    limit = None if timeout is None else datetime.timedelta(seconds=timeout)
    slices = {1: [list(range(size))], 2: [list(range(size // 2)), list(range(size // 2, size))]}
    return {
        count: [dist.new_group(ranks, timeout=limit) if len(ranks) > 1 else None for ranks in each]
        for count, each in slices.items()
    } | ({size: [None] * size} if size > 2 else {})


def histories(rank: int) -> dict[str, list[dict[str, Any]]]:
    """What each history came to on this rank."""
    size = dist.get_world_size()
    groups = _made(size)
    found: dict[str, list[dict[str, Any]]] = {"whole": [], "failing": []}
    for number in range(COUNT + FAILING):
        failing = number >= COUNT
        if failing:
            # A group whose ranks were waited for in vain is broken.
            groups = _made(size, BOUND)
        history = draw(number, size, failing=failing)
        own = groups[history.rows][rank * history.rows // size]
        found["failing" if failing else "whole"].append(
            _serve(history, rank, history.groups(rank, groups[1][0], own))
        )
        dist.barrier()
    return found
