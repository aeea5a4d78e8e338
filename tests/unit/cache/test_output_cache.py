"""Forecast of the model output: nothing runs on a cached step, polynomials come out exactly."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_cachedit_plugin.cache.cached_model import CachedTransformer, preset_mask
from sglang_cachedit_plugin.cache.output_cache import OutputHistory
from sglang_cachedit_plugin.cache.spec import Identity, TransformerSpec
from sglang_cachedit_plugin.cache.step_plan import StepPlan, build_plan
from sglang_cachedit_plugin.config.settings import CacheSettings
from sglang_cachedit_plugin.report.stats import TransformerStats
from tests.unit.blocks import Rig, TinyDiT, known_classes, wanted

MASK = (1, 1, 1, 0, 1, 0, 0, 1)
POSITIONS = (1000.0, 960.0, 900.0, 850.0, 700.0, 550.0, 300.0, 100.0)


@pytest.fixture
def transformer():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    ).eval()


def inputs(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 4, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 3, 8, generator=generator),
        "pooled_projections": torch.randn(1, 8, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3), "return_dict": False,
    }


def run(transformer, settings: CacheSettings, forwards=None, **spec):
    """Outputs by step, statistics, and block calls of each step."""
    mounted = CachedTransformer("transformer", transformer)
    now = {}
    stats = TransformerStats(steps=len(MASK))
    plan, _ = build_plan(settings, len(MASK), preset_mask)
    spec = TransformerSpec(name="transformer", settings=settings, plan=plan, timesteps=POSITIONS, **spec)
    mounted.refresh(wanted(spec, stats, lambda name, kwargs: now["identity"]))
    calls = []
    handles = [
        block.register_forward_pre_hook(lambda *_: calls.append(now["identity"].step))
        for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    ]
    outputs = []
    with torch.no_grad():
        for branch, step in forwards or [("cond", step) for step in range(len(MASK))]:
            now["identity"] = Identity(branch, step)
            outputs.append(transformer(**inputs(step if branch == "cond" else 100 + step))[0])
    for handle in handles:
        handle.remove()
    mounted.unmount()
    return outputs, stats, calls


STATIC = dict(
    steps_computation_mask=MASK, steps_computation_policy="static", max_warmup_steps=0, forecast="output"
)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_static_schedule_runs_nothing_on_cached_steps(transformer, order):
    outputs, stats, calls = run(transformer, CacheSettings(**STATIC, forecast_order=order))
    cached = [step for step, computed in enumerate(MASK) if not computed]
    assert stats.branches["cond"].cached == cached
    assert sorted(calls) == sorted([s for s in range(8) if s not in cached] * 4)
    with torch.no_grad():
        plain = [transformer(**inputs(step))[0] for step in range(len(MASK))]
    for step in range(len(MASK)):
        assert torch.equal(outputs[step], plain[step]) == (step not in cached)


def test_the_dynamic_threshold_runs_the_first_block_to_decide(transformer):
    settings = CacheSettings(
        residual_diff_threshold=1.0, max_warmup_steps=3, max_continuous_cached_steps=1, forecast="output"
    )
    _, stats, calls = run(transformer, settings)
    assert stats.branches["cond"].cached == [3, 5, 7]
    assert [calls.count(step) for step in range(8)] == [4, 4, 4, 1, 4, 1, 4, 1]


def test_the_limit_of_cached_steps_holds_for_measured_outputs(transformer):
    settings = CacheSettings(
        residual_diff_threshold=1.0, max_warmup_steps=1, max_continuous_cached_steps=-1, max_cached_steps=2,
        forecast="output",
    )
    _, stats, _ = run(transformer, settings)
    assert stats.branches["cond"].cached == [1, 2]


def test_branches_have_histories_of_their_own(transformer):
    both = [(branch, step) for step in range(8) for branch in ("cond", "uncond")]
    settings = CacheSettings(**STATIC)
    together, _, _ = run(transformer, settings, both)
    alone, _, _ = run(transformer, settings)
    mixed, _, _ = run(transformer, settings, [("cond", step) for step in range(8) for _ in range(2)])
    assert all(torch.equal(a, b) for a, b in zip(together[::2], alone, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(mixed[::2], alone, strict=True))


def test_fitted_weights_stand_in_for_the_polynomial(transformer):
    settings = CacheSettings(**STATIC)
    plain, _, _ = run(transformer, settings)
    fitted, _, _ = run(transformer, settings, weights={3: (0.25, 0.0, 1.0), 5: (2.0,)})
    torch.testing.assert_close(fitted[3], 0.25 * plain[0] + plain[2])
    torch.testing.assert_close(fitted[5], 2.0 * plain[4])
    assert torch.equal(fitted[6], plain[6])


def test_the_unconditional_branch_may_have_a_plan_of_its_own(transformer):
    settings = CacheSettings(**STATIC)
    other = StepPlan(num_steps=8, mask=(1, 0, 0, 1, 1, 1, 1, 0), static=True)
    both = [(branch, step) for step in range(8) for branch in ("cond", "uncond")]
    _, stats, _ = run(transformer, settings, both, uncond_plan=other)
    assert stats.branches["cond"].cached == [3, 5, 6]
    assert stats.branches["uncond"].cached == [1, 2, 7]


def test_a_result_changed_in_place_does_not_change_the_next(transformer):
    history = OutputHistory(1)
    value = torch.ones(2)
    history.update(0.0, (value,))
    value.zero_()
    (first,) = history.predict(1.0)
    assert first.tolist() == [1.0, 1.0]
    first.zero_()
    assert history.predict(2.0)[0].tolist() == [1.0, 1.0]


@given(
    st.integers(0, 3), st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    st.lists(st.integers(0, 40), min_size=5, max_size=5, unique=True),
)
def test_polynomials_are_exact_on_any_spacing(order, coefficients, places):
    def value(x):
        return torch.tensor([sum(c * x**k for k, c in enumerate(coefficients[: order + 1]))])

    history = OutputHistory(order)
    xs = [place / 10 for place in places]
    for x in xs[:4]:
        history.update(x, {"sample": value(x), "note": "kept"})
    forecast = history.predict(xs[4])
    assert forecast["note"] == "kept"
    scale = 1 + max(abs(value(x)).item() for x in xs) * (1 + max(abs(a - b) for a in xs for b in xs)) ** order * 400
    assert forecast["sample"].item() == pytest.approx(value(xs[4]).item(), abs=1e-6 * scale)


def test_an_output_that_hides_its_tensors_is_computed_every_time_and_the_report_says_so():
    @dataclass
    class Hidden:
        sample: torch.Tensor

    class Model(TinyDiT):
        def forward(self, hidden_states: torch.Tensor) -> Hidden:
            return Hidden(super().forward(hidden_states))

    with known_classes():
        rig = Rig(Model()).begin(
            4, forecast="output", steps_computation_mask=(1, 0, 0, 1), steps_computation_policy="static"
        )
        outputs = [rig.run("cond", step).sample for step in range(4)]
        assert rig.stats.branches["cond"].computed == [0, 1, 2, 3]
        assert any("no tensor" in note for note in rig.stats.notes)
        rig.mounted.bypass()
        assert all(torch.equal(rig.run("cond", step).sample, outputs[step]) for step in range(4))
