"""A change on two ranks of the host's own groups: both take it, or neither."""

from __future__ import annotations

import pytest

from tests.dist import world

CHANGE = {"enabled": True, "max_warmup_steps": 6}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank answered and held after each message."""
    return world.run(2, "tests.dist.control", tmp_path_factory.mktemp("control"))["messages"]


def test_both_ranks_give_the_same_answer_with_both_in_it(ranks):
    answers = [{name: each[:2] for name, each in rank.items()} for rank in ranks]
    assert answers[0] == answers[1]
    error, output, _ = ranks[0]["show"]
    assert error is None
    assert [each["rank"] for each in output] == [0, 1]


def test_both_take_a_change_and_take_it_back(ranks):
    for rank in ranks:
        assert rank["change"][2] == CHANGE
        assert rank["reset"][2] is None


@pytest.mark.parametrize(
    ("message", "part"), [("known to one rank only", "profile = 'draft'"), ("bad", "max_warmup_stepz = 1")]
)
def test_what_one_rank_refuses_neither_takes(ranks, message, part):
    for rank in ranks:
        error, output, held = rank[message]
        assert part in error and output is None
        assert held == CHANGE
