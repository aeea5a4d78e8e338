"""Real gloo processes: one value for all ranks, whatever their shards, and a message where they differ."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sglang_cachedit_plugin import agreement
from sglang_cachedit_plugin.host import connected
from sglang_cachedit_plugin.similarity import reduced_differences, residual_difference, residual_sums

TOKENS = (7, 3)
"""Unequal shards of the token axis."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _worker(rank: int, port: int, scenario: str, queue: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        queue.put((rank, SCENARIOS[scenario](rank)))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _tensors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 10, 16, generator=generator), torch.randn(2, 10, 16, generator=generator)


def _shard(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return tensor.split(TOKENS, dim=1)[rank]


def _reduced(reference: torch.Tensor, current: torch.Tensor, threshold: float = 0.0) -> float:
    (diff,), _ = reduced_differences(
        residual_sums(reference, current, threshold), dist.group.WORLD, device=reference.device,
        important_threshold=threshold,
    )
    return diff


def _shards(rank: int) -> float:
    reference, current = _tensors()
    return _reduced(_shard(reference, rank), _shard(current, rank))


def _shards_of_important_tokens(rank: int) -> float:
    reference, current = _tensors()
    return _reduced(_shard(reference, rank), _shard(current, rank), 1.4)


def _nan_on_one_rank(rank: int) -> float:
    reference, current = _tensors()
    if rank == 1:
        current[0, -1, 0] = float("nan")
    return _reduced(_shard(reference, rank), _shard(current, rank))


def _one_must_compute(rank: int) -> tuple[bool, bool]:
    cpu = torch.device("cpu")
    return tuple(
        reduced_differences(None, dist.group.WORLD, device=cpu, compute=compute)[1] for compute in (rank == 1, False)
    )


def _different_decisions(rank: int) -> str:
    agreement.verify(3, "cond", True, dist.group.WORLD)
    try:
        agreement.verify(4, "cond", rank == 0, dist.group.WORLD)
    except agreement.RanksDisagreeError as error:
        return str(error)
    return "agreed"


def _alone(rank: int) -> float:
    """A busy rank beside an idle one: no group, no waiting."""
    if rank == 1:
        return 0.0
    reference, current = _tensors()
    return residual_difference(reference, current)


SCENARIOS = {
    f.__name__: f
    for f in (_shards, _shards_of_important_tokens, _nan_on_one_rank, _one_must_compute, _different_decisions, _alone)
}


def run(scenario: str) -> list:
    """Results of the two ranks, in order."""
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    mp.spawn(_worker, args=(_free_port(), scenario, queue), nprocs=2)
    return [value for _, value in sorted(queue.get() for _ in range(2))]


@pytest.mark.parametrize(("scenario", "threshold"), [("_shards", 0.0), ("_shards_of_important_tokens", 1.4)])
def test_unequal_shards_give_the_value_of_the_whole(scenario, threshold):
    reference, current = _tensors()
    whole = residual_difference(reference, current, important_threshold=threshold)
    first, second = run(scenario)
    assert first == second == pytest.approx(whole, rel=1e-5)
    means = [_own_difference(_shard(reference, r), _shard(current, r), threshold) for r in range(2)]
    assert sum(means) / 2 != pytest.approx(whole, rel=1e-5), "the mean of the shards' values must not pass"


def _own_difference(reference, current, threshold):
    return residual_difference(reference, current, important_threshold=threshold)


def test_nan_on_one_rank_is_nan_on_all():
    assert all(value != value for value in run("_nan_on_one_rank"))


def test_lockstep_computes_if_either_must():
    assert run("_one_must_compute") == [(True, False), (True, False)]


def test_a_disagreement_stops_both_ranks_with_a_message():
    messages = run("_different_decisions")
    assert messages[0] == messages[1]
    for part in ("cond", "rank 0: step 4 cached unmeasured", "rank 1: step 4 computed unmeasured"):
        assert part in messages[0]


def test_a_rank_without_a_group_does_not_wait():
    assert run("_alone")[0] > 0


def test_connected_ranks_form_slices():
    # TP 2 x SP 2 in each of two replicas: the slices are the replicas.
    sets = [[0, 1], [2, 3], [4, 5], [6, 7], [0, 2], [1, 3], [4, 6], [5, 7]]
    assert connected(sets) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert connected([[0], [1]]) == [[0], [1]]
