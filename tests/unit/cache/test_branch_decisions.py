"""Decisions inside one branch: limits, calibrators, NaN, followed branches, buffers."""

from __future__ import annotations

import weakref

import pytest
import torch

from sglang_cachedit_plugin.cache.cached_model import CachedModel, preset_mask
from sglang_cachedit_plugin.cache.spec import RequestSpec, TransformerSpec
from sglang_cachedit_plugin.cache.step_plan import build_plan
from sglang_cachedit_plugin.config.settings import CacheSettings
from sglang_cachedit_plugin.report.stats import BranchStats, RequestStats
from tests.unit.blocks import Block, Linear, Rig, TinyDiT, TwoListsDiT, known_classes, sample

ALWAYS = {"residual_diff_threshold": 1.0}


@pytest.fixture(scope="module", autouse=True)
def _known():
    with known_classes():
        yield


def run_all(rig: Rig, num_steps: int, branch: str = "cond") -> BranchStats:
    for step in range(num_steps):
        rig.run(branch, step)
    return rig.stats.branches[branch]


def test_a_computed_step_resets_the_run_of_cached_steps():
    stats = run_all(Rig().begin(10, max_continuous_cached_steps=2, **ALWAYS), 10)
    assert stats.computed == [0, 3, 6, 9]
    # A step that the threshold computes resets the run too: cache-dit 1.5.1 counts on over it.
    rig = Rig().begin(8, max_continuous_cached_steps=2, residual_diff_threshold=0.5)
    jumps = {2, 5}
    value, ran = sample("cond", 0), []
    for step in range(8):
        value = value * -4 if step in jumps else value
        rig.run("cond", step, value)
        ran.append("computed" if step in rig.stats.branches["cond"].computed else "cached")
    assert [step for step in range(8) if ran[step] == "computed"] == [0, 2, 5]


def test_most_cached_steps():
    stats = run_all(Rig().begin(10, max_continuous_cached_steps=-1, max_cached_steps=3, **ALWAYS), 10)
    assert stats.cached == [1, 2, 3]


def test_the_sum_of_differences_stops_caching():
    knobs = {"residual_diff_threshold": 0.9, "max_continuous_cached_steps": -1}
    free = run_all(Rig().begin(8, **knobs), 8)
    assert free.cached == list(range(1, 8))
    limit = sum(free.residual_diffs[step] for step in (1, 2, 3)) - 1e-6
    limited = run_all(Rig().begin(8, max_accumulated_residual_diff_threshold=limit, **knobs), 8)
    assert limited.cached == [1, 2, 3]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_threshold_zero_never_caches_and_one_always(steps):
    never = run_all(Rig().begin(steps, residual_diff_threshold=0.0), steps)
    assert never.cached == []
    always = run_all(Rig().begin(steps, max_continuous_cached_steps=-1, **ALWAYS), steps)
    assert always.computed == [0]


def test_a_recorded_difference_is_that_of_the_first_blocks_residual():
    rig = Rig().begin(2, residual_diff_threshold=0.9)
    run_all(rig, 2)
    first = Block(0).double()
    with torch.no_grad():
        before, now = (first(x) - x for x in (sample("cond", 0).double(), sample("cond", 1).double()))
    expected = float((now - before).abs().mean() / before.abs().mean())
    assert rig.stats.branches["cond"].residual_diffs == {1: pytest.approx(expected, rel=1e-4)}


def test_a_nan_difference_computes_the_step_and_is_counted():
    rig = Rig().begin(4, residual_diff_threshold=0.9)
    rig.run("cond", 0)
    rig.run("cond", 1, torch.full_like(sample("cond", 1), float("nan")))
    rig.run("cond", 2)
    rig.run("cond", 3)
    stats = rig.stats.branches["cond"]
    assert (stats.computed, stats.cached, stats.nan_diffs) == ([0, 1, 2], [3], 2)


@pytest.mark.parametrize("policy", ["static", "dynamic"])
def test_another_shape_is_computed_afresh(policy):
    rig = Rig().begin(4, steps_computation_mask=(1, 0, 0, 0), steps_computation_policy=policy, **ALWAYS)
    for step in range(4):
        value = sample("cond", step)
        rig.run("cond", step, value if step < 2 else torch.cat([value, value], dim=1))
    assert rig.stats.branches["cond"].computed == [0, 2]


def test_the_second_expert_starts_late():
    rig = Rig(name="transformer_2").begin(
        4, first_step=8, steps_computation_mask=(1, 0, 1, 0), steps_computation_policy="static"
    )
    for step in range(8, 12):
        rig.run("cond", step)
    assert rig.stats.branches["cond"] == BranchStats(computed=[8, 10], cached=[9, 11])


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("model", [TinyDiT, TwoListsDiT])
def test_other_branches_follow_cond_where_asked(separate, model):
    rig = Rig(model()).begin(
        6, cfg_diff_compute_separate=separate, residual_diff_threshold=0.9, max_continuous_cached_steps=-1
    )
    alone = {}
    for branch in ("cond", "uncond"):
        alone[branch] = run_all(
            Rig(model()).begin(6, residual_diff_threshold=0.9, max_continuous_cached_steps=-1), 6, branch
        ).residual_diffs
    assert alone["cond"] != alone["uncond"]
    for _ in range(2):  # a second round of the loop follows its own cond, not that of the first
        rig.stats.branches.clear()
        for step in range(6):
            rig.run("cond", step)
            rig.run("uncond", step)
        measured = {name: branch.residual_diffs for name, branch in rig.stats.branches.items()}
        assert measured == {"cond": alone["cond"], "uncond": alone["uncond" if separate else "cond"]}


def test_where_cond_did_not_run_the_others_measure_for_themselves():
    knobs = {"residual_diff_threshold": 0.9, "max_continuous_cached_steps": -1}
    alone = run_all(Rig().begin(3, **knobs), 3, "uncond").residual_diffs
    rig = Rig().begin(3, cfg_diff_compute_separate=False, **knobs)
    for branch, step in [("cond", 0), ("uncond", 0), ("cond", 1), ("uncond", 1), ("uncond", 2)]:
        rig.run(branch, step)
    diffs = rig.stats.branches["uncond"].residual_diffs
    assert diffs == {1: rig.stats.branches["cond"].residual_diffs[1], 2: alone[2]}


def test_following_a_second_round_uses_that_rounds_difference():
    rig = Rig().begin(2, cfg_diff_compute_separate=False, residual_diff_threshold=0.5)
    for second in (sample("cond", 1), sample("cond", 1) * -3):
        rig.run("cond", 0)
        rig.run("uncond", 0)
        rig.run("cond", 1, second)
        rig.run("uncond", 1)
    stats = rig.stats.branches
    assert stats["cond"].cached == stats["uncond"].cached == [1]
    assert stats["cond"].computed == stats["uncond"].computed == [0, 0, 1]


CALIBRATORS = {
    "none": {},
    "taylorseer 1": {"enable_taylorseer": True, "taylorseer_order": 1},
    "taylorseer 2": {"enable_taylorseer": True, "taylorseer_order": 2},
    "dmd": {"enable_dmd": True, "dmd_history": 6},
}


@pytest.mark.parametrize("name", CALIBRATORS)
def test_every_calibrator_runs_and_forecasts_better_than_reuse(name):
    mask = (1, 1, 1, 1, 1, 1, 0, 0)
    positions = tuple(float(step) for step in range(8))

    def worst(knobs):
        rig = Rig().begin(
            8, positions=positions, steps_computation_mask=mask, steps_computation_policy="static", **knobs
        )
        plain, errors = TinyDiT(), []
        for step in range(8):
            value = sample("cond", step, scale=0.05)
            output = rig.run("cond", step, value)
            with torch.no_grad():
                errors.append((output - plain(value)).abs().max().item())
        assert rig.stats.branches["cond"].cached == [6, 7]
        assert max(errors[:6]) == 0.0
        return max(errors[6:])

    reuse = worst({})
    assert reuse > 0.01
    if name != "none":
        assert worst(CALIBRATORS[name]) < 0.5 * reuse


@pytest.mark.parametrize("calibrator", ["taylorseer 1", "none"])
def test_a_residual_that_moves_linearly_over_uneven_positions_is_met_exactly(calibrator):
    # Each Linear block doubles the first token's share, so the residual is linear in the input, and the
    # input is linear in the position.
    positions = (1000.0, 940.0, 700.0, 650.0, 300.0, 20.0)
    mask = (1, 1, 0, 1, 0, 0)
    model, plain = TinyDiT(4, Linear), TinyDiT(4, Linear)
    rig = Rig(model).begin(
        6, positions=positions, steps_computation_mask=mask, steps_computation_policy="static",
        **CALIBRATORS[calibrator],
    )
    start, drift = sample("cond", 0), sample("uncond", 0)
    errors = []
    for step, position in enumerate(positions):
        value = start + drift * position / 1000
        errors.append((rig.run("cond", step, value) - plain(value)).abs().max().item())
    assert rig.stats.branches["cond"].cached == [2, 4, 5]
    if calibrator == "none":
        assert max(errors) > 0.1
    else:
        assert max(errors) < 1e-4


def request(modules: dict, now: dict, **knobs) -> RequestSpec:
    """``now["identity"]`` is the next forward's."""
    settings = CacheSettings(**{"max_warmup_steps": 1, **knobs})
    plan, _ = build_plan(settings, 4, preset_mask)
    return RequestSpec(
        transformers=tuple(TransformerSpec(name=name, settings=settings, plan=plan) for name in modules),
        stats=RequestStats(backend="native", enabled=True), identify=lambda name, kwargs: now["identity"],
    )


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_bypass_frees_every_tensor(calibrator):
    rig = Rig().begin(4, **CALIBRATORS[calibrator], **ALWAYS)
    run_all(rig, 4)
    run_all(rig, 4, "uncond")
    assert len(rig.mounted.cache._states) == 2
    kept = [weakref.ref(state.middle["hidden_states"].latest) for state in rig.mounted.cache._states.values()]
    assert all(residual() is not None for residual in kept)
    rig.mounted.bypass()
    assert all(residual() is None for residual in kept)
    assert rig.mounted.buffer_bytes() == 0


def test_one_transformer_that_cannot_be_mounted_unmounts_the_other():
    modules = {"transformer": TinyDiT(), "transformer_2": torch.nn.Linear(2, 2)}
    model = CachedModel(modules)
    with pytest.raises(Exception, match="Linear"):
        model.mount()
    assert not model.mounted
    assert "forward" not in modules["transformer"].__dict__


def test_the_bytes_held_are_those_of_two_hidden_states():
    from sglang_cachedit_plugin.cache.spec import Identity

    modules, now = {"transformer": TinyDiT()}, {"identity": Identity("cond", 0)}
    model = CachedModel(modules)
    model.prepare(request(modules, now, **ALWAYS))
    assert model.buffer_bytes() == 0
    with torch.no_grad():
        modules["transformer"](sample("cond", 0))
    assert model.buffer_bytes() == 2 * sample("cond", 0).numel() * 4
    model.prepare(None)
    assert model.buffer_bytes() == 0
    assert isinstance(modules["transformer"].transformer_blocks[0], Block)


def test_what_a_calibrator_or_an_output_forecast_holds_is_counted_too():
    from sglang_cachedit_plugin.cache.spec import Identity

    held = {}
    for name, knobs in {
        "plain": {}, "taylorseer": {"enable_taylorseer": True}, "output": {"forecast": "output"},
    }.items():
        modules, now = {"transformer": TinyDiT()}, {}
        model = CachedModel(modules)
        model.prepare(request(modules, now, max_warmup_steps=3, **knobs))
        for step in range(3):
            now["identity"] = Identity("cond", step)
            with torch.no_grad():
                modules["transformer"](sample("cond", step))
        held[name] = model.buffer_bytes() // (sample("cond", 0).numel() * 4)
        model.prepare(None)
        assert model.buffer_bytes() == 0
    # First and middle residual; TaylorSeer 1 keeps two middle residuals; the output forecast two outputs.
    assert held == {"plain": 2, "taylorseer": 3, "output": 4}
