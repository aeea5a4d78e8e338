"""A forward whose input has another shape or dtype than what its history was computed on is computed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from sglang_cachedit_plugin import adapters
from sglang_cachedit_plugin.adapters import Blocks, ModelAdapter
from sglang_cachedit_plugin.cache.cached_model import preset_mask
from sglang_cachedit_plugin.cache.inputs import differ, given
from sglang_cachedit_plugin.cache.spec import Identity, TransformerSpec
from sglang_cachedit_plugin.cache.step_plan import build_plan
from sglang_cachedit_plugin.config.settings import CacheSettings
from tests.unit.blocks import DIM, Rig, TinyDiT, known_classes, wanted

STEPS = 8
STATIC = {"steps_computation_mask": (1, 1, 0, 0, 0, 1, 0, 0), "steps_computation_policy": "static"}
MEASURED = {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": 2}
MODES = {
    "residual, static": STATIC,
    "residual, measured": MEASURED,
    "residual, measured, taylorseer": {**MEASURED, "residual_diff_threshold": 0.99, "enable_taylorseer": True},
    "residual, static, dmd": {**STATIC, "enable_dmd": True, "dmd_history": 3, "dmd_rank": 2},
    "output, static": {**STATIC, "forecast": "output"},
    "output, measured": {**MEASURED, "forecast": "output"},
}


class WithText(TinyDiT):
    """Its output has the shape of its latents, whatever the length of its text."""

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(hidden_states if text is None else hidden_states + text.mean(1, keepdim=True))


@pytest.fixture(scope="module", autouse=True)
def _known() -> Iterator[None]:
    adapters.NATIVE["WithText"] = ModelAdapter(
        family="tiny", blocks=(Blocks(name="transformer_blocks", streams=("hidden_states",)),)
    )
    with known_classes():
        yield
    del adapters.NATIVE["WithText"]


@dataclass(frozen=True)
class Form:
    batch: int = 1
    tokens: int = 5
    text: int | None = None
    dtype: torch.dtype = torch.float32

    def inputs(self, branch: str, step: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(sum(map(ord, branch)))
        start, drift = (torch.randn(2, 7, DIM, generator=generator) for _ in range(2))
        made = {"hidden_states": (start + 0.15 * step * drift)[: self.batch, : self.tokens].to(self.dtype)}
        if self.text is not None:
            made["text"] = torch.randn(self.batch, 7, DIM, generator=generator)[:, : self.text].to(self.dtype)
        return made


FORMS = [Form(batch=2), Form(), Form(tokens=4), Form(dtype=torch.float64), Form(text=3), Form(text=4)]
CHANGES = [(FORMS[0], FORMS[1]), (FORMS[1], FORMS[2]), (FORMS[1], FORMS[3]), (FORMS[4], FORMS[5])]


class Served(Rig):
    @torch.no_grad()
    def forward(self, branch: str, step: int, form: Form) -> torch.Tensor:
        self.identity = Identity(branch, step)
        # Weights of no dtype of their own, so that inputs of any are served.
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(form.dtype)
        return self.model(**form.inputs(branch, step))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("forms", CHANGES)
def test_after_a_change_of_the_input_a_step_is_computed_and_caching_goes_on_from_there(mode, forms):
    rig, anew, plain = (Served(WithText()) for _ in range(3))
    rig.begin(STEPS, **MODES[mode])
    anew.begin(STEPS, **MODES[mode])
    for step in range(3):
        rig.forward("cond", step, forms[0])
    assert rig.stats.branch("cond").cached
    for step in range(3, STEPS):
        output = rig.forward("cond", step, forms[1])
        assert torch.equal(output, anew.forward("cond", step, forms[1])), step
        assert step != 3 or torch.equal(output, plain.forward("cond", step, forms[1]))
    assert 3 in rig.stats.branch("cond").computed
    assert 4 in rig.stats.branch("cond").cached
    assert list(rig.stats.remarks.values()) == ["cond: its input changed shape or dtype at step 3, computed anew"]
    assert rig.mounted.buffer_bytes() == anew.mounted.buffer_bytes()


@st.composite
def sequences(draw) -> list[tuple[str, int, Form]]:
    """Forwards of three branches in rising steps, each branch with changes of its input now and then."""
    forwards = []
    forms = {branch: draw(st.sampled_from(FORMS)) for branch in ("cond", "uncond", "perturbed")}
    for step in range(STEPS):
        for branch in draw(st.lists(st.sampled_from(sorted(forms)), unique=True, max_size=3)):
            if draw(st.integers(0, 3)) == 0:
                forms[branch] = draw(st.sampled_from(FORMS))
            forwards.append((branch, step, forms[branch]))
    return forwards


@settings(max_examples=60, deadline=None)
@drawn(forwards=sequences(), mode=st.sampled_from(sorted(MODES)))
def test_no_branch_sees_another_and_no_history_outlives_a_change(forwards, mode):
    """Against one fresh mount for each branch and stretch of equal inputs."""
    rig = Served(WithText()).begin(STEPS, **MODES[mode])
    outputs = {(branch, step): rig.forward(branch, step, form) for branch, step, form in forwards}
    for branch in ("cond", "uncond", "perturbed"):
        computed: list[int] = []
        own = [forward for forward in forwards if forward[0] == branch]
        # A text that comes or goes is no change of its form.
        for _, stretch in itertools.groupby(own, key=_Stretches()):
            alone = Served(WithText()).begin(STEPS, **MODES[mode])
            for _, step, form in stretch:
                assert torch.equal(outputs[branch, step], alone.forward(branch, step, form)), (branch, step)
            computed += alone.stats.branch(branch).computed
        assert rig.stats.branch(branch).computed == computed


@dataclass
class _Stretches:
    """Number of the stretch of equal inputs to which a forward belongs."""

    number: int = 0
    last: dict[str, Any] = field(default_factory=dict)

    def __call__(self, forward: tuple[str, int, Form]) -> int:
        now = given((), forward[2].inputs("cond", 0))
        self.number += differ(self.last, now)
        self.last = dict(now)
        return self.number


def test_a_limit_of_cached_steps_counts_on_over_a_change():
    rig = Served().begin(STEPS, residual_diff_threshold=1.0, max_cached_steps=3, max_continuous_cached_steps=-1)
    for step in range(STEPS):
        rig.forward("cond", step, FORMS[step // 3 % 2])
    assert rig.stats.branch("cond").cached == [1, 2, 4]


def test_each_change_is_told_in_one_remark_and_a_new_round_is_none():
    rig = Served().begin(STEPS, **STATIC)
    for step in range(3):
        rig.forward("cond", step, FORMS[step % 2])
    (remark,) = rig.stats.remarks.values()
    assert remark == "cond: its input changed shape or dtype at steps 1, 2, computed anew"
    rig.begin(STEPS, **STATIC)
    for form in FORMS[:2]:
        for step in range(STEPS):
            rig.forward("cond", step, form)
    assert not rig.stats.remarks
    assert rig.stats.branch("cond").cached == [2, 3, 4, 6, 7] * 2


def test_fitted_weights_are_not_used_once_a_change_had_a_step_computed_that_the_schedule_leaves_out():
    def outputs(change_at: int) -> list[torch.Tensor]:
        rig = Served()
        knobs = CacheSettings(**STATIC, forecast="output", forecast_order=0, max_warmup_steps=0)
        plan, _ = build_plan(knobs, STEPS, preset_mask)
        spec = TransformerSpec(name="transformer", settings=knobs, plan=plan, weights={6: (2.0,), 7: (2.0,)})
        rig.mounted.refresh(wanted(spec, rig.stats, rig._identify))
        return [rig.forward("cond", step, FORMS[step >= change_at]) for step in range(STEPS)]

    on_schedule, off_schedule = outputs(change_at=5), outputs(change_at=4)
    assert torch.equal(on_schedule[6], 2.0 * on_schedule[5])
    assert torch.equal(off_schedule[6], off_schedule[5])


def test_around_a_graph_a_change_of_the_input_is_computed_too():
    rig = Served().begin(STEPS, **STATIC, forecast="output")
    calls: list[int] = []

    def replay(hidden_states: torch.Tensor) -> torch.Tensor:
        calls.append(len(hidden_states))
        return 2 * hidden_states

    for step in range(STEPS):
        inputs = FORMS[step >= 3].inputs("cond", step)
        rig.identity = Identity("cond", step)
        output = rig.mounted.run_around(replay, (), inputs)
        assert output.shape == inputs["hidden_states"].shape
    assert calls == [2, 2, 1, 1]
    assert (rig.stats.branch("cond").computed, rig.stats.branch("cond").cached) == ([0, 1, 3, 5], [2, 4, 6, 7])
    assert "changed shape or dtype at step 3" in next(iter(rig.stats.remarks.values()))


def test_where_hooks_split_the_input_over_ranks_the_whole_counts():
    rig = Served().begin(STEPS, **STATIC)
    own, parts = rig.model.forward, iter([5, 5, 4, 4])
    # As cache-dit's hooks do: what they leave of it may change on one rank alone.
    rig.model.forward = lambda hidden_states: own(hidden_states[:, : next(parts)])
    rig.mounted.identify_outside()
    for step in range(2):
        rig.forward("cond", step, FORMS[1])
    rig.forward("cond", 2, FORMS[1])
    assert not rig.stats.remarks
    rig.forward("cond", 3, FORMS[2])
    assert rig.stats.remarks


@dataclass
class Nested:
    tokens: torch.Tensor
    kept: Any = None


WIDE, NARROW = torch.zeros(2, 3), torch.zeros(1, 3)


@pytest.mark.parametrize(("before", "now", "changed"), [
    ({"x": WIDE}, {"x": WIDE + 1}, False),
    ({"x": WIDE}, {"x": NARROW}, True),
    ({"x": WIDE}, {"x": WIDE.double()}, True),
    ({"x": [NARROW, NARROW]}, {"x": [NARROW]}, True),
    ({"x": {"a": WIDE}}, {"x": {"a": NARROW}}, True),
    ({"x": Nested(WIDE)}, {"x": Nested(NARROW)}, True),
    ({"x": Nested(WIDE, {})}, {"x": Nested(WIDE, {"a": WIDE})}, False),
    ({"x": Nested(WIDE, Nested(WIDE))}, {"x": Nested(WIDE, Nested(NARROW))}, False),
    ({"x": WIDE, "keys": [{}, {}]}, {"x": WIDE, "keys": [{"a": WIDE}, {"a": WIDE}]}, False),
    ({"x": WIDE, "scale": 1.0}, {"x": WIDE, "scale": 2.0}, False),
])
def test_the_form_of_an_input_is_that_of_its_tensors(before, now, changed):
    assert differ(given((), before), given((), now)) is changed
    assert differ(given((WIDE,), before), given((NARROW,), before))
    assert given((), MappingProxyType(before)) == given((), before)
