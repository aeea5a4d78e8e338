"""A change on two ranks of the host's own groups: both take it, or neither."""

from __future__ import annotations

import json
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sglang_cachedit_plugin import defaults
from sglang_cachedit_plugin.defaults import Defaults
from sglang_cachedit_plugin.serving import channel
from sglang_cachedit_plugin.sources import read_file

from .test_ranks import _free_port

CHANGE = {"enabled": True, "max_warmup_steps": 6}
MESSAGES = [
    ("show", None), ("set", CHANGE), ("set", {"profile": "draft"}), ("set", {"max_warmup_stepz": 1}), ("set", None),
]


class _ServerArgs:
    cache_dit_config = None


def _rank(rank: int, port: int, queue: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from sglang.multimodal_gen.runtime.distributed import parallel_state as state
    from sglang.multimodal_gen.runtime.platforms import initialize_current_platform

    initialize_current_platform()
    state.init_distributed_environment(
        world_size=2, rank=rank, local_rank=rank, distributed_init_method=f"tcp://127.0.0.1:{port}", backend="gloo"
    )
    # Only rank 0 knows the profile: its file was changed while the ranks started.
    defaults.install(Defaults(file=read_file({"profiles": {"draft": {}} if rank == 0 else {}})))
    seen = []
    for do, settings in MESSAGES:
        answer = channel.handle(_ServerArgs(), json.dumps({"do": do, "settings": settings}))
        current = defaults.current()
        seen.append((answer.error, answer.output and json.loads(answer.output), current.overrides.given))
    queue.put((rank, seen))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    """What each rank answered and held after each message."""
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    mp.spawn(_rank, args=(_free_port(), queue), nprocs=2)
    found = dict(queue.get() for _ in range(2))
    return [dict(zip(range(len(MESSAGES)), found[rank], strict=True)) for rank in range(2)]


def test_both_ranks_give_the_same_answer_with_both_in_it(ranks):
    assert [ranks[0][i][:2] for i in ranks[0]] == [ranks[1][i][:2] for i in ranks[1]]
    error, output, _ = ranks[0][0]
    assert error is None
    assert [each["rank"] for each in output] == [0, 1]


def test_both_take_a_change_and_take_it_back(ranks):
    for rank in ranks:
        assert rank[1][2] == CHANGE
        assert rank[4][2] is None


@pytest.mark.parametrize(("message", "part"), [(2, "profile = 'draft'"), (3, "max_warmup_stepz = 1")])
def test_what_one_rank_refuses_neither_takes(ranks, message, part):
    for rank in ranks:
        error, output, held = rank[message]
        assert part in error and output is None
        assert held == CHANGE
