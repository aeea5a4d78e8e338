"""Four real gloo processes in SGLang's own layouts: who decides with whom, and that nobody else is waited for."""

from __future__ import annotations

import pytest
import torch

from sglang_cachedit_plugin.integration.ranks import connected
from sglang_cachedit_plugin.cache.spec import Groups

from tests.dist import world
from tests.dist.histories import faults

ALL, NONE = [[0, 1, 2, 3]] * 4, [[]] * 4
HALVES = [[0, 1], [0, 1], [2, 3], [2, 3]]
EXPECTED = {
    "Ulysses 4": (ALL, NONE, "Ulysses4"),
    "Ulysses 2 x ring 2": (ALL, NONE, "Ulysses2_Ring2"),
    "TP 4": (ALL, NONE, "TP4"),
    "TP 2 x SP 2": (ALL, NONE, "Ulysses2_TP2"),
    "CFG 2 x SP 2": (HALVES, ALL, "Ulysses2"),
    "CFG 2 x TP 2": (HALVES, ALL, "TP2"),
    "replicas 2 x SP 2": (HALVES, NONE, "Ulysses2"),
    "replicas 2 x TP 2": (HALVES, NONE, "TP2"),
    "replicas 2 x CFG 2": (NONE, HALVES, ""),
    "replicas 4": (NONE, NONE, ""),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of the four ranks by scenario."""
    return world.run(4, "tests.dist.four", tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("layout", EXPECTED)
def test_groups_of_the_hosts_layout(ranks, layout):
    forward, pair, told = EXPECTED[layout]
    found = [each[layout] for each in ranks["every_layout"]]
    assert [each["forward"] for each in found] == forward
    assert [each["cfg_group"] for each in found] == pair
    assert [each["layout"] for each in found] == [told] * 4
    joint = pair if pair != NONE else forward
    assert [each["joint"]["forward"] for each in found] == joint
    # Where the main rank alone runs a stage, its CFG peers are not in it.
    assert [each["main rank"]["cfg_group"] for each in found] == NONE
    assert [each["main rank"]["forward"] for each in found] == forward


@pytest.mark.parametrize("layout", EXPECTED)
def test_the_value_of_the_whole_sequence_on_all_ranks(ranks, layout):
    for each in ranks["every_layout"]:
        report, whole = each[layout]["report"], each["whole"]
        assert report["cached"] == whole["cached"] and report["computed"] == whole["computed"]
        assert report["residual_diffs"] == pytest.approx(whole["residual_diffs"], abs=1e-6)
        assert 0 < len(whole["cached"]) < 8


def test_a_forward_over_the_cfg_ranks_is_decided_by_them(ranks):
    found = [each["replicas 2 x CFG 2"] for each in ranks["one_forward_over_cfg_ranks"]]
    assert [each["forward"] for each in found] == HALVES
    assert [each["cfg_group"] for each in found] == NONE
    assert [each["sp_rank"] for each in found] == [(0, 2), (1, 2)] * 2
    found = [each["CFG 2 x TP 2"] for each in ranks["one_forward_over_cfg_ranks"]]
    assert [each["forward"] for each in found] == ALL


def test_a_busy_replica_does_not_wait_for_an_idle_one(ranks):
    busy, idle = ranks["idle_replica"][:2], ranks["idle_replica"][2:]
    assert busy[0]["report"] == busy[1]["report"]
    assert 0 < len(busy[0]["report"]["cached"]) < 8
    assert all(each["collectives"] > 0 for each in busy) and all(each["collectives"] == 0 for each in idle)


def test_branches_of_several_ranks_agree_within_and_in_lockstep_between(ranks):
    found = ranks["cfg_with_shards"]
    for name in ("off", "on"):
        assert found[0][name] == found[1][name] and found[2][name] == found[3][name]
    assert found[0]["off"]["computed"] != found[2]["off"]["computed"]
    assert found[0]["on"]["computed"] == found[2]["on"]["computed"]


def test_no_rank_waits_for_another_in_random_histories(ranks):
    assert faults(ranks["histories"]) == []
    cached = [each["cached"] for each in ranks["histories"][0]["whole"]]
    assert sum(map(bool, cached)) > len(cached) / 2, "otherwise this shows nothing"


def test_ranks_that_gather_weights_from_one_another_decide_together_or_not_at_all(ranks):
    for each in ranks["fsdp"]:
        assert each["over the branches"] == {"gathered": True, "weights": [0, 1, 2, 3]}
        assert each["within a branch"]["gathered"] is False and len(each["within a branch"]["weights"]) == 2
        assert each["over replicas"] == "FSDP gathers the weights from 4 ranks, and 2 of them serve the request"


def test_ranks_whose_layout_is_not_known_are_not_cached(ranks):
    assert ranks["unknown_layout"] == ["the layout of the 4 ranks is not known: each would decide alone"] * 4


@pytest.mark.parametrize("kind", ["control", "alone"])
def test_branches_of_cut_latents_end_with_the_same_shards(ranks, kind):
    found = ranks["steps_of_branches_with_shards"]
    by_shard = {}
    for each in found:
        by_shard.setdefault(each["sp_rank"], []).append(each[kind])
    for one, other in by_shard.values():
        assert torch.equal(one["latents"], other["latents"])
    assert len({each[kind]["corrected"] for each in found}) == 1 and found[0][kind]["corrected"] > 0


def test_groups_of_device_meshes(ranks):
    found = ranks["meshes"]
    assert [each["none"] for each in found] == NONE
    assert [each["three axes"] for each in found] == ALL
    assert [each["context"] for each in found] == ALL
    assert [each["tensor"] for each in found] == HALVES


def test_a_mesh_over_replicas_is_refused(ranks):
    for over, within, none in ranks["mesh_over_replicas"]:
        assert over == (
            "parallelism_config = '4 ranks' (--cache-dit-config): at most the 2 ranks of one data-parallel replica"
        )
        assert within == none == ""


def test_connected_ranks_form_slices():
    # TP 2 x SP 2 in each of two replicas: the slices are the replicas.
    sets = [[0, 1], [2, 3], [4, 5], [6, 7], [0, 2], [1, 3], [4, 6], [5, 7]]
    assert connected(sets) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert connected([[0], [1]]) == [[0], [1]]


@pytest.mark.parametrize(
    ("tokens", "shards", "local", "real"),
    [(10, 2, 5, [5, 5]), (9, 2, 5, [5, 4]), (9, 4, 3, [3, 3, 3, 0]), (13, 8, 2, [2, 2, 2, 2, 2, 2, 1, 0]),
     (None, 2, 5, [5, 5]), (100, 2, 5, [5, 5]), (3, 2, 5, [5, 5])],
)
def test_real_tokens_of_each_shard(tokens, shards, local, real):
    groups = [Groups(sp_rank=shard, sp_ranks=shards, tokens=tokens) for shard in range(shards)]
    assert [each.real_tokens(local) for each in groups] == real
