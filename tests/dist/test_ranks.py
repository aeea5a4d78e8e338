"""Two real gloo processes: one decision for all ranks, few collectives, and a message where ranks differ."""

from __future__ import annotations

import math

import pytest
import torch

from tests.dist import world
from tests.dist.histories import faults
from tests.dist.two import COUNTED


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of the two ranks by scenario."""
    return world.run(2, "tests.dist.two", tmp_path_factory.mktemp("two"))


def test_no_rank_waits_for_another_in_random_histories(ranks):
    assert faults(ranks["histories"]) == []
    cached = [each["cached"] for each in ranks["histories"][0]["whole"]]
    assert sum(map(bool, cached)) > len(cached) / 2, "otherwise this shows nothing"


def test_a_fault_that_one_rank_finds_is_met_by_both(ranks):
    first, second = ranks["fault_on_one_rank"]
    assert first["cached"] == second["cached"] == []
    assert "RuntimeError: block failed" in second["problem"] and "rank 1: " in first["problem"]


def test_a_model_that_one_rank_cannot_mount_runs_uncached_on_both(ranks):
    first, second = ranks["mount_on_one_rank"]
    assert first == (False, "rank 1: no such blocks", "BYPASSED")
    assert second == (False, "no such blocks", "UNMOUNTABLE")


def test_random_shards_give_the_value_of_the_whole(ranks):
    rows = [row for each in ranks["random_shards"] for row in each]
    for value, whole, _ in rows:
        assert value == pytest.approx(whole, rel=1e-5, nan_ok=True)
    finite = [row for row in rows if not math.isnan(row[2])]
    unlike = [mean for _, whole, mean in finite if mean != pytest.approx(whole, rel=1e-5)]
    assert len(unlike) > len(finite) / 2, "the mean of the shards' own values must not pass"


def test_padding_of_the_sequence_does_not_count(ranks):
    for value, whole in [row for each in ranks["padded_shards"] for row in each]:
        assert value == pytest.approx(whole, rel=1e-5)


def test_nan_on_one_rank_is_computed_on_all(ranks):
    first, second = ranks["nan_on_one_rank"]
    assert first == second
    assert first["nan_diffs"] == 2, "at the NaN, and at the step that is compared with it"
    assert {3, 4} <= set(first["computed"]) and 5 in first["cached"]


def test_another_shape_on_one_rank_is_computed_on_all(ranks):
    first, second = ranks["another_shape_on_one_rank"]
    assert first["computed"] == second["computed"] == [0, 3]
    assert first["nan_diffs"] == second["nan_diffs"] == 0


def test_shards_that_would_decide_otherwise_decide_together(ranks):
    first, second = ranks["unlike_shards"]
    assert first["alone"]["cached"] != second["alone"]["cached"], "otherwise this shows nothing"
    assert first["together"] == second["together"]
    assert first["together"]["cached"] not in (first["alone"]["cached"], second["alone"]["cached"])


@pytest.mark.parametrize("name", [name for name in COUNTED if "measured" not in name])
def test_nothing_to_measure_is_no_collective(ranks, name):
    for each in ranks["counted_collectives"]:
        assert each[name] == ({}, 0)


@pytest.mark.parametrize("name", [name for name in COUNTED if "measured" in name])
def test_a_measured_step_is_one_collective(ranks, name):
    for each in ranks["counted_collectives"]:
        counts, measured = each[name]
        assert measured > 0
        assert counts == {"all_reduce": measured}


def test_lockstep_computes_where_either_branch_must(ranks):
    cond, uncond = ranks["lockstep"]
    assert cond["off"]["computed"] != uncond["off"]["computed"]
    assert cond["on"]["computed"] == uncond["on"]["computed"]
    assert cond["on"]["residual_diffs"] != uncond["on"]["residual_diffs"], "each branch reports its own"
    looked_at = {"all_gather": 1}
    assert cond["counts"] == {"all_reduce": len(cond["on"]["residual_diffs"])} | looked_at
    assert cond["verified"] == cond["on"] and uncond["verified"] == uncond["on"]


def test_lockstep_leaves_out_forwards_that_only_one_rank_has(ranks):
    first, second = ranks["lockstep_with_uneven_branches"]
    assert first["cond"]["computed"] == second["uncond"]["computed"]
    assert first["perturbed"]["computed"] != first["cond"]["computed"]


def test_lockstep_with_a_branch_that_cannot_be_told_apart(ranks):
    cond, uncond = ranks["lockstep_where_one_branch_is_lost"]
    assert cond["cached"] == uncond["cached"] == [1, 2, 3]
    assert cond["computed"][-4:] == uncond["computed"][-4:] == [4, 5, 6, 7]


def test_a_branch_on_another_rank_can_follow_cond(ranks):
    cond, uncond = ranks["following_cond"]
    assert cond["pair"] == cond["alone"]
    assert uncond["pair"] == uncond["alone"]
    assert 0 < len(uncond["pair"]["cached"]) < 12


def test_a_disagreement_is_told_on_both_ranks_with_rank_step_and_values(ranks):
    first, second = ranks["different_decisions"]
    assert first == second
    agreed, decision, settings = first
    assert agreed == "agreed"
    assert decision == (
        "ranks disagree in branch cond: rank 0: step 4 cached at difference 0.210000, "
        "rank 1: step 4 computed at difference 0.270000"
    )
    assert settings == "ranks disagree in settings: rank 0: settings 0; rank 1: settings 1"


def test_every_step_is_compared(ranks):
    for each in ranks["verified_every_step"]:
        assert each == {"static": 6, "static output": 6, "measured": 6}


def test_a_failure_in_one_branch_ends_the_request_on_both_ranks_and_the_next_works(ranks):
    first, second = ranks["failure"]
    for name, found in first.items():
        assert found["error"] == "RanksDisagreeError: step 5 failed on rank 1: RuntimeError: block failed", name
        assert second[name]["error"] == "RuntimeError: block failed"
        for each in (found, second[name]):
            assert len(each["next"]["cached"]) + len(each["next"]["computed"]) == 8


def test_one_decision_covers_a_joint_forward(ranks):
    first, second = ranks["joint_decision"]
    assert first["together"] == second["together"]
    assert first["failed"] == "RanksDisagreeError: step 2 failed on rank 1: RuntimeError: block failed"
    assert second["failed"] == "RuntimeError: block failed"


def _decisions(found: dict) -> set[tuple]:
    return {(tuple(branch["computed"]), tuple(branch["cached"])) for branch in found["branches"].values()}


@pytest.mark.parametrize("kind", ["control", "corrector"])
def test_steps_of_cut_latents_are_those_of_the_whole(ranks, kind):
    """One collective for each forecast that is measured, of which the whole needs none."""
    first, second = ranks["steps_on_shards"]
    whole = first[f"whole {kind}"]
    assert first[kind]["corrected"] == second[kind]["corrected"] == whole["corrected"] > 0
    assert _decisions(first[kind]) == _decisions(second[kind]) == _decisions(whole)
    together = torch.cat([first[kind]["latents"], second[kind]["latents"]], dim=1)
    torch.testing.assert_close(together, whole["latents"], rtol=1e-5, atol=1e-5)
    assert whole["counts"] == {}


def test_an_error_tolerance_is_one_collective_for_each_computed_step_with_a_forecast(ranks):
    for layout in ("steps_on_shards", "steps_on_replicas", "steps_of_branches"):
        for each in ranks[layout]:
            ((computed, cached),) = _decisions(each["control"])
            assert cached and each["control"]["counts"] == {"all_reduce": len(computed) - 2}, layout


@pytest.mark.parametrize(
    ("layout", "kind"),
    [("steps_on_replicas", "control"), ("steps_on_replicas", "corrector"), ("steps_of_branches", "control"),
     ("steps_of_branches", "alone"), ("steps_of_branches", "lockstep"), ("steps_of_branches", "static")],
)
def test_ranks_of_the_same_latents_end_with_the_same_picture(ranks, layout, kind):
    first, second = (each[kind] for each in ranks[layout])
    assert torch.equal(first["latents"], second["latents"])
    assert first["corrected"] == second["corrected"] > 0


def test_outputs_that_differ_by_rounding_decide_the_same(ranks):
    first, second = (each["rounding"] for each in ranks["steps_on_replicas"])
    assert _decisions(first) == _decisions(second)


def test_branches_that_decide_alone_agree_which_steps_count_as_cached(ranks):
    first, second = (each["alone"] for each in ranks["steps_of_branches"])
    assert _decisions(first) != _decisions(second), "otherwise this shows nothing"
    cached = set().union(*(set(cached) for found in (first, second) for _, cached in _decisions(found)))
    last = max(set(range(20)) - cached)
    assert first["corrected"] == sum(step < last for step in cached)
    for found in (first, second):
        # One for each step that either branch may cache: the first is computed by the warmup.
        assert found["counts"] == {"all_reduce": 19}


def test_branches_with_a_static_schedule_know_without_talking(ranks):
    assert [each["static"]["counts"] for each in ranks["steps_of_branches"]] == [{}, {}]
