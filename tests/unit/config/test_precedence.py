"""Request over file over environment over default, each value with its origin."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_cachedit_plugin.config.settings import CALIBRATOR_KNOBS, KNOBS, SCHEDULE_KNOBS, CacheSettings
from sglang_cachedit_plugin.config.sources import Source, Value, read_environment, read_file, read_request, resolve

DEFAULTS = CacheSettings()
ENV = "SGLANG_CACHE_DIT_"
GROUPS = [SCHEDULE_KNOBS, CALIBRATOR_KNOBS]

PLAIN = {
    "Fn_compute_blocks": st.integers(1, 9),
    "Bn_compute_blocks": st.integers(0, 9),
    "max_warmup_steps": st.integers(0, 50),
    "residual_diff_threshold": st.floats(0, 1),
    "max_continuous_cached_steps": st.integers(-1, 9),
    "taylorseer_order": st.integers(1, 2),
    "dmd_svd_precision": st.sampled_from(["low", "medium", "high"]),
    "max_cached_steps": st.integers(-1, 50),
    "forecast": st.sampled_from(["residual", "output"]),
}
SCHEDULES = st.sampled_from(
    [{}, {"scm_preset": "none"}, {"scm_preset": "fast"}, {"scm_compute_bins": [4, 1], "scm_cache_bins": [2]}]
)
CALIBRATORS = st.sampled_from([{}, {"enable_taylorseer": True}, {"enable_dmd": True}, {"enable_dmd": False}])


@st.composite
def layers(draw):
    given = draw(st.fixed_dictionaries({}, optional=PLAIN))
    return {**given, **draw(SCHEDULES), **draw(CALIBRATORS)}


@st.composite
def sources(draw):
    return draw(layers()), draw(st.one_of(st.just({}), layers()))


def canonical(raw: dict) -> dict:
    values = {("steps_computation_mask" if k == "scm_preset" else k): v for k, v in raw.items()}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return {k: None if v == "none" else v for k, v in values.items()}


def expected(strongest_first: list[tuple[str, dict]]) -> dict[str, tuple]:
    """From the weakest up: each layer overwrites; a layer that speaks of a group wipes the group first."""
    state = {name: (getattr(DEFAULTS, name), "default") for name in KNOBS}
    for label, raw in reversed(strongest_first):
        values = canonical(raw)
        for group in GROUPS:
            if group & values.keys():
                state.update({name: (getattr(DEFAULTS, name), "default") for name in group})
        state.update({name: (value, label) for name, value in values.items()})
    return state


def as_source(label: str, primary: dict, secondary: dict) -> Source:
    mark = read_request({**primary, "secondary": secondary}, origin=label)
    return Source(primary=mark.primary, secondary=mark.secondary)


@settings(max_examples=150, deadline=None)
@given(st.lists(sources(), min_size=1, max_size=4))
def test_the_strongest_source_that_speaks_wins(drawn):
    labels = ["request", "profile", "file", "environment"][: len(drawn)]
    resolved = resolve(*(as_source(label, *each) for label, each in zip(labels, drawn, strict=True)))
    primary = expected([(label, first) for label, (first, _) in zip(labels, drawn, strict=True)])
    secondary = expected(
        [pair for label, (first, second) in zip(labels, drawn, strict=True)
         for pair in ((f"{label}.secondary", second), (label, first))]
    )
    for name in KNOBS:
        for settings_, origins, oracle in (
            (resolved.primary, resolved.origins, primary),
            (resolved.secondary, resolved.secondary_origins, secondary),
        ):
            value, label = oracle[name]
            assert getattr(settings_, name) == value, name
            # An origin ends with the key as it was written: scm_preset or steps_computation_mask.
            assert origins[name] == label or origins[name].startswith(label + "."), name


def everything(request: dict | None, file: dict, environment: dict[str, str]):
    return resolve(
        read_request(request), read_file({"cache_config": file}).source,
        read_environment({ENV + k: v for k, v in environment.items()})[0],
    )


def test_a_request_switches_off_the_environments_schedule():
    bins = {"SCM_COMPUTE_BINS": "6,2", "SCM_CACHE_BINS": "2,2"}
    assert everything({}, {}, bins).primary.scm_compute_bins == (6, 2)
    off = everything({"scm_preset": "none"}, {}, bins).primary
    assert (off.steps_computation_mask, off.scm_compute_bins, off.scm_cache_bins) == (None, None, None)
    fast = everything({}, {"steps_computation_mask": "fast"}, bins).primary
    assert (fast.steps_computation_mask, fast.scm_compute_bins) == ("fast", None)


def test_a_calibrator_is_chosen_whole():
    dmd = everything({"enable_dmd": True}, {}, {"TAYLORSEER": "true", "TS_ORDER": "2"}).primary
    assert (dmd.calibrator, dmd.taylorseer_order) == ("dmd", 2)
    none = everything({"enable_taylorseer": False}, {"enable_dmd": True}, {}).primary
    assert none.calibrator is None
    split = everything({"enable_dmd": True, "secondary": {"enable_taylorseer": True}}, {}, {})
    assert (split.primary.calibrator, split.secondary.calibrator) == ("dmd", "taylorseer")


def test_the_second_transformer_inherits():
    resolved = everything(
        {"max_warmup_steps": 7}, {}, {"SECONDARY_WARMUP": "2", "FN": "3", "SECONDARY_BN": "1"}
    )
    assert resolved.secondary == CacheSettings(max_warmup_steps=7, Fn_compute_blocks=3, Bn_compute_blocks=1)
    assert resolved.primary.Bn_compute_blocks == 0
    assert resolved.secondary_origins["max_warmup_steps"] == "cache_dit_params.max_warmup_steps"
    assert resolved.secondary_origins["Fn_compute_blocks"] == ENV + "FN"
    assert set(resolved.config()) - set(KNOBS) == {"secondary.Bn_compute_blocks"}


def test_an_empty_source_changes_nothing():
    assert resolve(Source(), Source()).primary == resolve().secondary == DEFAULTS
    assert resolve(Source(profile=None), Source(profile="a"), Source(profile="b")).profile == "a"
    assert resolve(Source(primary={"strict": Value(True, "x")})).primary.strict is True


@pytest.mark.parametrize(
    "raw",
    [
        {"parallelism_config": {"ulysses_size": 2, "parallel_kwargs": {"attention_backend": "native"}}},
        {"parallelism_config": {"ulysses_size": 2}, "parallel_kwargs": {"attention_backend": "native"}},
    ],
)
def test_the_older_parallel_kwargs_is_read_with_a_warning(raw):
    file = read_file(raw)
    assert file.passed_on == {"parallelism_config": {"ulysses_size": 2, "attention_backend": "native"}}
    assert len(file.warnings) == 1 and "parallel_kwargs" in file.warnings[0]
