"""Every diffusion transformer of the host's registry: cached as its row says, or left alone with the reason."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from sglang_cachedit_plugin import adapters
from sglang_cachedit_plugin.errors import MountError
from sglang_cachedit_plugin.integration import native
from sglang_cachedit_plugin.integration.request import WORKER
from tests.models.native.cases import CASES
from tests.models.native.harness import (
    CACHED,
    COMPUTED,
    MASK,
    STEPS,
    Rig,
    batch,
    distance,
    same,
    set_arguments,
    stage_of,
)

STATIC = {"scm_policy": "static", "max_warmup_steps": 0}
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1e-2, None: 1e-2}


def named(ability: str) -> list[str]:
    """Names of the cases whose row has this ability."""
    return [name for name in CASES if adapters.NATIVE[name.partition("-")[0]].ability == ability]


@functools.cache
def rig(name: str) -> Rig:
    """One rig for all tests of a case."""
    return Rig(CASES[name])


def branch(report: dict) -> dict:
    """The conditional branch of the report's only transformer."""
    (transformer,) = report["transformers"].values()
    (only,) = transformer["branches"].values()
    return only


def test_every_class_of_the_registry_has_a_row():
    from sglang.multimodal_gen.runtime.models.registry import _discover_and_register_models

    classes = {name for name, (component, *_) in _discover_and_register_models().items() if component == "dits"}
    assert classes == set(adapters.NATIVE)


def test_a_row_says_run_where_a_case_runs_it():
    run = {name.partition("-")[0] for name in CASES}
    assert {name for name, row in adapters.NATIVE.items() if row.verified == "run"} == run
    assert run == {name for name, row in adapters.NATIVE.items() if row.ability != "none"}


@pytest.mark.parametrize("name", CASES)
def test_the_tiny_model_moves(name):
    # A model whose output hardly depends on its blocks or on the step could hide any fault.
    plain = rig(name).plain()
    assert all(torch.isfinite(leaf).all() for output in plain for leaf in output)
    assert distance(plain[-1], plain[0]) > 0.2


@pytest.mark.parametrize("name", named("blocks"))
def test_all_computed_and_bypass_are_the_original_bit_for_bit(name):
    each = rig(name)
    plain = each.plain()
    computed, report = each.request(steps_computation_mask=[1] * STEPS, **STATIC)
    assert same(computed, plain)
    assert branch(report)["computed"] == list(range(STEPS))
    # The block hooks were in place: a forward that slipped past them would be the original too.
    measured, report = each.request(residual_diff_threshold=1e-9, max_warmup_steps=0)
    assert same(measured, plain)
    assert len(branch(report)["residual_diffs"]) == STEPS - 1
    bypassed, report = each.request(enable=False)
    assert same(bypassed, plain)
    assert not report["enabled"]


@pytest.mark.parametrize(("first", "last"), [(1, 0), (2, 1), (1, 2)])
@pytest.mark.parametrize("name", named("blocks"))
def test_a_cached_step_runs_the_first_and_last_blocks_only(name, first, last):
    each = rig(name)
    plain = each.plain()
    full = each.counts[0]
    outputs, report = each.request(
        steps_computation_mask=MASK, Fn_compute_blocks=first, Bn_compute_blocks=last, **STATIC
    )
    assert [each.counts[step] for step in COMPUTED] == [full] * len(COMPUTED)
    assert [each.counts[step] for step in CACHED] == [each.kept(full, first, last)] * len(CACHED)
    assert each.kept(full, first, last) != full
    assert (branch(report)["computed"], branch(report)["cached"]) == (COMPUTED, CACHED)
    assert (report["enabled"], report["cached_steps"], report["computed_steps"]) == (True, 2, 4)
    assert [same([outputs[step]], [plain[step]]) for step in range(STEPS)] == [bool(step) for step in MASK]


@pytest.mark.parametrize(("first", "last"), [(1, 0), (1, 1)])
@pytest.mark.parametrize("name", named("blocks"))
def test_a_cached_step_on_equal_inputs_is_the_computed_one(name, first, last):
    # Holds only if every stream is forecast, none is kept by reference and overwritten, and the order is right.
    each = rig(name)
    plain = each.plain(at=0)
    outputs, report = each.request(
        at=0, steps_computation_mask=MASK, Fn_compute_blocks=first, Bn_compute_blocks=last, **STATIC
    )
    assert branch(report)["cached"] == CACHED
    for step in range(STEPS):
        assert distance(outputs[step], plain[step]) < ROUNDING[each.case.dtype]


@pytest.mark.parametrize("name", named("blocks"))
def test_equal_inputs_measure_no_difference(name):
    _, report = rig(name).request(at=0, residual_diff_threshold=0.5, max_warmup_steps=1)
    diffs = branch(report)["residual_diffs"]
    assert diffs
    assert set(diffs.values()) == {0.0}
    assert branch(report)["nan_diffs"] == 0
    assert branch(report)["cached"] == [1, 2, 3, 5]


@pytest.mark.parametrize("name", named("blocks"))
def test_a_second_request_of_another_size_sees_nothing_of_the_first(name):
    each = rig(name)
    fresh, _ = each.request(size=1, steps_computation_mask=MASK, **STATIC)
    each.request(size=0, steps_computation_mask=MASK, **STATIC)
    again, report = each.request(size=1, steps_computation_mask=MASK, **STATIC)
    assert same(again, fresh)
    assert branch(report)["cached"] == CACHED
    assert same([again[step] for step in COMPUTED], [each.plain(size=1)[step] for step in COMPUTED])


@pytest.mark.parametrize("name", named("output"))
def test_where_no_block_can_be_left_out_the_output_is_forecast(name):
    each = rig(name)
    plain = each.plain()
    outputs, report = each.request(steps_computation_mask=MASK, **STATIC)
    assert same(outputs, plain)
    assert not report["enabled"]
    assert each.row.output_only in report["reason"]
    assert "forecast: output" in report["reason"]
    outputs, report = each.request(steps_computation_mask=MASK, forecast="output", **STATIC)
    assert branch(report)["cached"] == CACHED
    assert same([outputs[step] for step in COMPUTED], [plain[step] for step in COMPUTED])
    fixed, _ = each.request(at=0, steps_computation_mask=MASK, forecast="output", **STATIC)
    assert max(distance(a, b) for a, b in zip(fixed, each.plain(at=0), strict=True)) < 1e-5
    _, report = each.request(forecast="output", residual_diff_threshold=0.5)
    assert not report["enabled"]
    assert "static" in report["reason"]


def refused() -> list[str]:
    """Classes that cannot be cached."""
    return [name for name, row in adapters.NATIVE.items() if row.ability == "none"]


def empty(name: str) -> nn.Module:
    """An instance of the host's class without any of its parts."""
    from sglang.multimodal_gen.runtime.models.registry import ModelRegistry

    cls = ModelRegistry.registered_models[name].load_model_cls()
    model = cls.__new__(cls)
    nn.Module.__init__(model)
    return model


@pytest.mark.parametrize("name", refused())
def test_a_class_that_cannot_be_cached_runs_on_with_the_reason_or_fails_with_strict(name):
    model = empty(name)
    stage = stage_of(model, set_arguments())
    native.CacheDitDenoisingMixin._maybe_enable_cache_dit(stage, STEPS, batch(True, {}))
    report = WORKER.active.sessions.pop().close().as_dict()
    assert not report["enabled"]
    assert report["reason"] == f"{name}: {adapters.NATIVE[name].unsupported}"
    assert "forward" not in model.__dict__
    with pytest.raises(MountError, match=name):
        native.CacheDitDenoisingMixin._maybe_enable_cache_dit(stage, STEPS, batch(True, {"strict": True}))
    WORKER.active.sessions.pop()
