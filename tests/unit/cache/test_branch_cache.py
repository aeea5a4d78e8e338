"""States by identity: no branch sees another, schedules run exactly the blocks they should."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_cachedit_plugin.cache.spec import Identity
from sglang_cachedit_plugin.errors import MountError
from sglang_cachedit_plugin.report.stats import BranchStats
from tests.unit.blocks import Rig, TinyDiT, TwoListsDiT, known_classes, sample

BRANCHES = ("cond", "uncond", "perturbed")
STEPS = 8


@pytest.fixture(scope="module", autouse=True)
def _known():
    with known_classes():
        yield


def blocks(*numbers: int) -> list[str]:
    return [f"transformer_blocks.{number}" for number in numbers]


EVERY = blocks(*range(6))

KNOBS = st.fixed_dictionaries(
    {
        "residual_diff_threshold": st.sampled_from([0.0, 0.04, 0.08, 0.15, 0.3, 1.0]),
        "max_warmup_steps": st.integers(0, 3),
        "max_continuous_cached_steps": st.sampled_from([-1, 1, 2]),
        "Bn_compute_blocks": st.integers(0, 2),
    },
    optional={
        "max_cached_steps": st.integers(0, 4),
        "enable_taylorseer": st.booleans(),
        "taylorseer_order": st.integers(1, 2),
        "max_accumulated_residual_diff_threshold": st.floats(0.01, 0.5),
    },
)


@st.composite
def interleavings(draw):
    """Forwards of up to three branches: each in rising steps, possibly with gaps, in any mixture."""
    ahead = {
        branch: sorted(draw(st.sets(st.integers(0, STEPS - 1), min_size=2)))
        for branch in BRANCHES[: draw(st.integers(1, 3))]
    }
    sequence = []
    while ahead:
        branch = draw(st.sampled_from(sorted(ahead)))
        sequence.append((branch, ahead[branch].pop(0)))
        if not ahead[branch]:
            del ahead[branch]
    return sequence


@pytest.mark.parametrize("model", [TinyDiT, TwoListsDiT])
@settings(max_examples=100, deadline=None)
@given(sequence=interleavings(), knobs=KNOBS)
def test_each_branch_runs_as_if_it_were_alone(model, sequence, knobs):
    mixed = Rig(model()).begin(STEPS, **knobs)
    outputs = [(branch, step, mixed.run(branch, step)) for branch, step in sequence]
    for branch in {branch for branch, _ in sequence}:
        alone = Rig(model()).begin(STEPS, **knobs)
        for other, step, output in outputs:
            if other == branch:
                assert torch.equal(output, alone.run(branch, step)), (branch, step)
        assert mixed.stats.branches[branch] == alone.stats.branches[branch]


def test_a_shared_branch_name_would_change_decisions_and_outputs():
    def run(rename):
        rig = Rig().begin(STEPS, residual_diff_threshold=0.15, max_continuous_cached_steps=2)
        outputs = {}
        for step in range(STEPS):
            for branch in ("cond", "uncond"):
                rig.identity = Identity(rename(branch, step)[0], rename(branch, step)[1])
                with torch.no_grad():
                    outputs[branch, step] = rig.model(sample(branch, step))
        return rig, outputs

    rig, right = run(lambda branch, step: (branch, step))
    assert rig.stats.branches["cond"].cached
    _, mixed = run(lambda branch, step: ("cond", 2 * step + (branch == "uncond")))
    assert any(not torch.equal(right[key], mixed[key]) for key in right)


def test_uncond_reuses_its_own_residual_even_when_told_to_cache_blindly():
    # A static mask takes no measurement, so only the residual's owner can differ.
    rig = Rig().begin(3, steps_computation_mask=(1, 0, 0), steps_computation_policy="static")
    for branch in ("cond", "uncond"):
        rig.run(branch, 0)
    cached = rig.run("uncond", 1)
    alone = Rig().begin(3, steps_computation_mask=(1, 0, 0), steps_computation_policy="static")
    alone.run("uncond", 0)
    assert torch.equal(cached, alone.run("uncond", 1))
    wrong = Rig().begin(3, steps_computation_mask=(1, 0, 0), steps_computation_policy="static")
    wrong.run("cond", 0)
    assert not torch.equal(cached, wrong.run("cond", 1, sample("uncond", 1)))


@pytest.mark.parametrize(("first", "last"), [(1, 0), (2, 1), (3, 2), (1, 4)])
def test_a_static_mask_runs_exactly_its_blocks(first, last):
    mask = (1, 1, 0, 0, 0, 1, 0, 1)
    rig = Rig().begin(
        8, Fn_compute_blocks=first, Bn_compute_blocks=last, max_continuous_cached_steps=1,
        steps_computation_mask=mask, steps_computation_policy="static",
    )
    ran = [rig.run_counted("cond", step) for step in range(8)]
    kept = blocks(*range(first), *range(6 - last, 6))
    assert ran == [EVERY if computed else kept for computed in mask]
    assert rig.stats.branches["cond"] == BranchStats(computed=[0, 1, 5, 7], cached=[2, 3, 4, 6])


def test_first_and_last_blocks_that_leave_no_middle_compute_every_step():
    rig = Rig().begin(
        4, Fn_compute_blocks=3, Bn_compute_blocks=3, steps_computation_mask=(1, 0, 0, 0),
        steps_computation_policy="static",
    )
    assert [rig.run_counted("cond", step) for step in range(4)] == [EVERY] * 4
    assert rig.stats.branches["cond"] == BranchStats(computed=[0, 1, 2, 3])


def test_two_block_lists_both_skip():
    rig = Rig(TwoListsDiT()).begin(2, steps_computation_mask=(1, 0), steps_computation_policy="static")
    assert len(rig.run_counted("cond", 0)) == 8
    assert rig.run_counted("cond", 1) == ["transformer_blocks.0", "single_blocks.0"]
    assert rig.stats.branches["cond"].cached == [1]


def test_a_step_is_cached_only_where_every_list_was():
    rig = Rig(TwoListsDiT()).begin(2, residual_diff_threshold=0.5)
    decisions: list[bool] = []
    rig.mounted.cache.on_decision = decisions.append
    original = rig.model.single_blocks[0].forward
    rig.run("cond", 0)
    rig.model.single_blocks[0].forward = lambda hidden_states: original(hidden_states) * 3
    rig.run("cond", 1)
    assert decisions == [False, False, True, False]
    assert rig.stats.branches["cond"] == BranchStats(
        computed=[0, 1], cached=[], residual_diffs=rig.stats.branches["cond"].residual_diffs
    )


def test_off_and_all_ones_are_the_unmounted_model_bit_for_bit():
    plain = TinyDiT()
    with torch.no_grad():
        expected = [plain(sample("cond", step)) for step in range(STEPS)]
    rig = Rig()
    assert all(torch.equal(rig.run("cond", step), expected[step]) for step in range(STEPS)), "mounted"
    rig.begin(STEPS, steps_computation_mask=(1,) * STEPS)
    assert all(torch.equal(rig.run("cond", step), expected[step]) for step in range(STEPS)), "ones"
    rig.begin(STEPS, residual_diff_threshold=1.0)
    assert not all(torch.equal(rig.run("cond", step), expected[step]) for step in range(STEPS)), "cached"
    rig.mounted.bypass()
    assert all(torch.equal(rig.run("cond", step), expected[step]) for step in range(STEPS)), "bypass"


def test_a_forward_without_identity_is_the_original():
    rig = Rig().begin(STEPS, residual_diff_threshold=1.0)
    for step in range(3):
        rig.run("cond", step)
    rig.identity = None
    with torch.no_grad():
        assert torch.equal(rig.model(sample("cond", 3)), TinyDiT()(sample("cond", 3)))
    assert rig.stats.branches["cond"].computed == [0]


@pytest.mark.parametrize("slot", ["forward", "_old_forward"])
def test_unmount_leaves_no_trace(slot):
    model = TinyDiT()
    if slot == "_old_forward":
        # as accelerate's offload hook leaves a module
        model._old_forward = model.forward
        model.forward = lambda *args, **kwargs: model._old_forward(*args, **kwargs)
    before, modules = dict(model.__dict__), dict(model._modules)
    rig = Rig(model).begin(2, residual_diff_threshold=1.0)
    assert model.__dict__[slot] is not before.get(slot)
    rig.run("cond", 0)
    rig.run("cond", 1)
    assert rig.stats.branches["cond"].cached == [1]
    rig.mounted.unmount()
    assert model.__dict__.keys() == before.keys()
    assert all(model.__dict__[name] is value for name, value in before.items())
    assert model._modules == modules


def test_the_same_identity_twice_computes_everything_from_then_on():
    rig = Rig().begin(STEPS, residual_diff_threshold=1.0, max_continuous_cached_steps=-1)
    assert rig.run_counted("cond", 0) == EVERY
    assert rig.run_counted("cond", 0) == EVERY
    rig.run("uncond", 0)
    for step in range(1, STEPS):
        assert rig.run_counted("cond", step) == EVERY
        assert rig.run_counted("uncond", step) == blocks(0)
    assert rig.stats.notes == ["cond: forwards cannot be told apart, every step is computed"]
    rig.begin(2, residual_diff_threshold=1.0)
    rig.run("cond", 0)
    assert rig.run_counted("cond", 1) == blocks(0), "the next request starts clean"


@pytest.mark.parametrize("calibrator", [{}, {"enable_taylorseer": True}], ids=["latest", "taylorseer"])
def test_an_earlier_step_starts_a_new_round(calibrator):
    knobs = {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": -1, "max_cached_steps": 2, **calibrator}
    rig, fresh = Rig().begin(4, **knobs), Rig().begin(4, **knobs)
    for step in range(4):
        rig.run("cond", step)
    other = [sample("perturbed", step) for step in range(4)]
    for step in range(4):
        assert torch.equal(rig.run("cond", step, other[step]), fresh.run("cond", step, other[step])), step
    assert rig.stats.branches["cond"] == BranchStats(computed=[0, 3, 0, 3], cached=[1, 2, 1, 2])
    assert not rig.stats.notes


def test_blocks_that_do_not_fit_leave_the_original():
    rig = Rig()
    with pytest.raises(MountError, match="Fn_compute_blocks 4 \\+ Bn_compute_blocks 3 exceed the 6 blocks"):
        rig.begin(STEPS, Fn_compute_blocks=4, Bn_compute_blocks=3)
    assert rig.run_counted("cond", 0) == EVERY
    assert torch.equal(rig.run("cond", 1), TinyDiT()(sample("cond", 1)))


def test_a_class_nobody_describes_is_refused_untouched():
    class Unknown(TinyDiT.__base__):
        pass

    model = Unknown()
    with pytest.raises(MountError):
        Rig(model)
    assert "forward" not in model.__dict__


def test_a_failing_block_leaves_the_models_own_lists():
    rig = Rig()
    own = rig.model.transformer_blocks
    rig.begin(4, residual_diff_threshold=1.0)
    own[3].fail = True
    with pytest.raises(RuntimeError, match="block failed"):
        rig.run("cond", 0)
    assert rig.model.transformer_blocks is own
    assert list(rig.model._modules) == ["transformer_blocks"]
    own[3].fail = False
    rig.begin(4, residual_diff_threshold=1.0)
    rig.run("cond", 0)
    assert rig.run_counted("cond", 1) == blocks(0)
