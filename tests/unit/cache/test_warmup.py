"""A warmup request meets every way of running a forward, and leaves nothing of it behind."""

from __future__ import annotations

import pytest
import torch

from sglang_cachedit_plugin.cache import rank_agreement
from sglang_cachedit_plugin.cache.dmd import DMDForecaster
from sglang_cachedit_plugin.cache.forecast import Extrapolator
from sglang_cachedit_plugin.cache.spec import Groups
from sglang_cachedit_plugin.cache.warmup import Warmup
from sglang_cachedit_plugin.errors import MountError
from tests.unit.blocks import Rig, known_classes, sample


@pytest.fixture(autouse=True)
def _rows():
    with known_classes():
        yield


def warmed_up(steps: int, rig: Rig | None = None, warn=pytest.fail, compiled: bool = False, **knobs) -> Rig:
    return (rig or Rig()).begin(steps, warmup=Warmup(warn, compiled=compiled).run, **knobs)


BLOCKS = [f"transformer_blocks.{index}" for index in range(6)]


def counts(rig: Rig, branch: str, step: int) -> dict[str, int]:
    rig.calls.clear()
    rig.run(branch, step)
    return dict(rig.calls)


@pytest.mark.parametrize(("knobs", "computed", "first"), [
    ({}, 2, 3), ({"forecast": "output"}, 3, 4), ({"Fn_compute_blocks": 2, "Bn_compute_blocks": 1}, 2, 3),
])
def test_each_branch_is_computed_and_cached_once_more(knobs, computed, first):
    rig = warmed_up(1, **knobs)
    edges = BLOCKS[: knobs.get("Fn_compute_blocks", 1)] + BLOCKS[6 - knobs.get("Bn_compute_blocks", 0):]
    for branch in ("cond", "uncond"):
        assert counts(rig, branch, 0) == {name: first if name in edges else computed for name in BLOCKS}
    assert counts(rig, "cond", 1) == dict.fromkeys(BLOCKS, 1)


def test_where_the_host_compiles_the_uncached_forward_runs_too():
    rig = warmed_up(1, compiled=True)
    assert counts(rig, "cond", 0)[BLOCKS[3]] == 3


def test_reports_and_pictures_are_those_without_a_warmup():
    plain = Rig().begin(6, residual_diff_threshold=0.9)
    rig = warmed_up(6, residual_diff_threshold=0.9)
    for step in range(6):
        assert torch.equal(rig.run("cond", step), plain.run("cond", step))
    assert rig.stats.as_dict() == plain.stats.as_dict()
    assert rig.stats.branches["cond"].cached and not rig.stats.notes
    rig.mounted.bypass()
    assert rig.mounted.request is None and rig.mounted.buffer_bytes() == 0


@pytest.mark.parametrize("kind", [Extrapolator, DMDForecaster])
@pytest.mark.parametrize("calibrator", ["enable_taylorseer", "enable_dmd"])
def test_forecasts_have_the_history_that_they_ask_for(monkeypatch, calibrator, kind):
    depths = []
    own = kind.predict

    def predict(self, *args, **kwargs):
        depths.append(len(self._known))
        return own(self, *args, **kwargs)

    monkeypatch.setattr(kind, "predict", predict)
    rig = warmed_up(1, taylorseer_order=2, dmd_history=5, **{calibrator: True})
    rig.run("cond", 0)
    if (calibrator == "enable_dmd") == (kind is DMDForecaster):
        assert depths == [5 if kind is DMDForecaster else 3]


def test_other_cfg_ranks_are_asked_what_they_found_and_nothing_else(monkeypatch):
    asked = []
    monkeypatch.setattr(rank_agreement, "problems", lambda own, group: asked.append((own, group)))
    # Any other exchange over this group raises.
    pair = object()
    rig = warmed_up(1, groups=Groups(forward=None, cfg_group=pair), lockstep=True)
    rig.run("cond", 0)
    assert asked == [("", pair)]


def test_a_model_that_cannot_be_run_again_is_left_to_the_host():
    """Its second forward fails, as one that keeps a state of its own may."""
    warnings: list[str] = []
    rig = Rig()
    forwards = []

    def fail_once(*_):
        forwards.append(1)
        if len(forwards) == 2:
            raise ConnectionError("state of the first forward")

    rig.model.transformer_blocks[0].register_forward_pre_hook(fail_once)
    expected = rig.model(sample("cond", 0))
    assert torch.equal(warmed_up(1, rig, warnings.append).run("cond", 0), expected)
    assert warnings == ["warmup of cached steps broke off: ConnectionError: state of the first forward"]
    assert rig.stats.branches["cond"].computed == [0]


def test_out_of_memory_and_strict_mounts_are_not_hidden(monkeypatch):
    for error in (torch.OutOfMemoryError("full"), MountError("wrong")):
        rig = warmed_up(1)
        def fail(*args, error=error):
            raise error
        monkeypatch.setattr(rig.mounted, "run", fail)
        with pytest.raises(type(error)):
            rig.run("cond", 0)
