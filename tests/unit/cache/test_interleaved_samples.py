"""Loops that run several samples in one forward and let them take turns in the blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sglang_cachedit_plugin import adapters
from sglang_cachedit_plugin.adapters import Blocks, ModelAdapter
from sglang_cachedit_plugin.report.stats import BranchStats
from tests.unit.blocks import DIM, TOKENS, Block, Rig

SIZE, STEPS = 5, 4


class Turns(nn.Module):
    """Runs each sample of its batch through the blocks.

    Args:
        order: the sample of each block call; None: one sample after the other.
        left_out: a block that a sample leaves out.
        changes: the loop adds something before each block, so that no block is given what the last one returned.
    """

    def __init__(
        self, order: list[int] | None = None, *, left_out: Mapping[int, int] = MappingProxyType({}),
        changes: bool = False,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(Block(seed) for seed in range(SIZE))
        self.order, self.left_out, self.changes = order, left_out, changes

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        samples = list(hidden_states.split(1))
        ahead = [[index for index in range(SIZE) if index != self.left_out.get(each)] for each in range(len(samples))]
        for sample in self.order or [each for each in range(len(samples)) for _ in range(SIZE)]:
            if ahead[sample]:
                given = samples[sample] + 0.01 if self.changes else samples[sample]
                samples[sample] = self.blocks[ahead[sample].pop(0)](given)
        return torch.cat(samples)


@pytest.fixture(scope="module", autouse=True)
def _known() -> Iterator[None]:
    adapters.NATIVE["Turns"] = ModelAdapter(family="turns", blocks=(Blocks(name="blocks", streams=("hidden_states",)),))
    yield
    del adapters.NATIVE["Turns"]


def inputs(step: int, speeds: list[float]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    start, drift = (torch.randn(len(speeds), TOKENS, DIM, generator=generator) for _ in range(2))
    return start + step * torch.tensor(speeds)[:, None, None] * drift


def run(model: Turns, speeds: list[float], **knobs) -> tuple[list[torch.Tensor], BranchStats, list[str]]:
    rig = Rig(model).begin(STEPS, **knobs)
    outputs = [rig.run("cond", step, inputs(step, speeds)) for step in range(STEPS)]
    return outputs, rig.stats.branch("cond"), rig.stats.notes


@torch.no_grad()
def plain(model: Turns, speeds: list[float]) -> list[torch.Tensor]:
    return [model(inputs(step, speeds)) for step in range(STEPS)]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, left, right))


@st.composite
def turns(draw) -> tuple[int, list[int]]:
    """(samples, the sample of each block call); samples begin in their order."""
    samples = draw(st.integers(2, 3))
    rest = draw(st.permutations([sample for sample in range(samples) for _ in range(SIZE - 1)]))
    order, begun = [], 0
    for sample in rest:
        while begun <= sample:
            order.append(begun)
            begun += 1
        order.append(sample)
    return samples, order + list(range(begun, samples))


KNOBS = st.fixed_dictionaries(
    {
        "residual_diff_threshold": st.sampled_from([0.05, 0.2, 1.0]),
        "Fn_compute_blocks": st.integers(1, 2),
        "Bn_compute_blocks": st.integers(0, 2),
        "max_continuous_cached_steps": st.sampled_from([-1, 1]),
    },
    optional={
        "enable_taylorseer": st.just(True),
        "steps_computation_mask": st.just((1, 0, 1, 0)),
        "steps_computation_policy": st.just("static"),
    },
)
SPEEDS = st.lists(st.sampled_from([0.0, 0.1, 0.8]), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None)
@given(taken=turns(), speeds=SPEEDS, knobs=KNOBS)
def test_samples_that_take_turns_run_as_one_after_the_other(taken, speeds, knobs):
    samples, order = taken
    outputs, stats, notes = run(Turns(order), speeds[:samples], **knobs)
    one_by_one = run(Turns(), speeds[:samples], **knobs)
    assert same(outputs, one_by_one[0])
    assert (stats.computed, stats.cached, notes) == (one_by_one[1].computed, one_by_one[1].cached, one_by_one[2])


@settings(max_examples=60, deadline=None)
@given(
    taken=turns(), speeds=SPEEDS, knobs=KNOBS, changes=st.booleans(),
    left_out=st.dictionaries(st.integers(0, 2), st.integers(1, SIZE - 1)),
)
def test_samples_that_skip_blocks_or_change_between_them_run_as_one_by_one_or_are_computed(
    taken, speeds, knobs, changes, left_out
):
    samples, order = taken
    loop = {"left_out": left_out, "changes": changes}
    outputs, stats, notes = run(Turns(order, **loop), speeds[:samples], **knobs)
    if not same(outputs, run(Turns(**loop), speeds[:samples], **knobs)[0]):
        assert same(outputs, plain(Turns(**loop), speeds[:samples]))
        assert stats.computed == list(range(STEPS))
        assert any("every step is computed" in note for note in notes)


@pytest.mark.parametrize("speeds", [[2.0, 0.0], [0.0, 2.0]])
def test_where_one_sample_moves_and_one_rests_the_moving_one_is_computed(speeds):
    outputs, stats, notes = run(Turns([0, 1] * SIZE), speeds, residual_diff_threshold=0.05)
    moving = speeds.index(2.0)
    for output, right in zip(outputs, plain(Turns(), speeds), strict=True):
        assert torch.equal(output[moving], right[moving])
        torch.testing.assert_close(output[1 - moving], right[1 - moving])
    assert (stats.computed, notes) == (list(range(STEPS)), [])


def test_samples_that_nothing_tells_apart_are_computed_and_the_report_says_so():
    model = Turns([0, 1, 1, 0] + [0, 1] * (SIZE - 2), changes=True)
    right = plain(model, [0.0, 0.0])
    outputs, stats, notes = run(model, [0.0, 0.0], residual_diff_threshold=1.0)
    assert same(outputs, right)
    assert (stats.computed, stats.cached) == (list(range(STEPS)), [])
    assert notes == ["cond: samples take turns in the blocks and cannot be told apart, every step is computed"]


def test_a_cached_sample_is_computed_after_all_where_a_later_call_cannot_be_told_apart():
    model = Turns(changes=True)
    right = plain(model, [0.1, 0.1])
    rig = Rig(model).begin(STEPS, residual_diff_threshold=1.0)
    assert torch.equal(rig.run("cond", 0, inputs(0, [0.1, 0.1])), right[0])
    # Sample 0 is cached alone before both stand before the same block.
    model.order = [0, 0, 1, 1, 0, 1] + [0, 1] * (SIZE - 3)
    outputs = [rig.run("cond", step, inputs(step, [0.1, 0.1])) for step in range(1, STEPS)]
    assert same(outputs, right[1:])
    assert rig.stats.branch("cond").computed == list(range(STEPS))
