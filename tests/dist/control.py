"""Control messages on two ranks of the host's own groups; results are checked in test_control_ranks.py."""

from __future__ import annotations

import json

from sglang.multimodal_gen.runtime.distributed import parallel_state
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch

from sglang_cachedit_plugin.config import effective
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.serving import channel
from sglang_cachedit_plugin.config.sources import read_file

CHANGE = {"enabled": True, "max_warmup_steps": 6}
MESSAGES = {
    "show": ("show", None),
    "change": ("set", CHANGE),
    "known to one rank only": ("set", {"profile": "draft"}),
    "bad": ("set", {"max_warmup_stepz": 1}),
    "reset": ("set", None),
}


class _ServerArgs:
    cache_dit_config = None


def messages(rank: int) -> dict[str, tuple]:
    """For each message the answer's error, its ranks, and the change that this rank then holds."""
    if parallel_state._WORLD is None:
        parallel_state.init_distributed_environment(world_size=2, rank=rank, local_rank=rank)
    # Only rank 0 knows the profile: its file was changed while the ranks started.
    effective.install(Defaults(file=read_file({"profiles": {"draft": {}} if rank == 0 else {}})))
    seen = {}
    for number, (name, (do, settings)) in enumerate(MESSAGES.items(), 1):
        answer = channel.handle(_ServerArgs(), json.dumps({"do": do, "settings": settings, "number": number}))
        assert isinstance(answer, OutputBatch)
        ranks = None if answer.output is None else json.loads(answer.output)
        seen[name] = (answer.error, ranks, effective.current().overrides.given)
    return seen


SCENARIOS = {"messages": messages}
