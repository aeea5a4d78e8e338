"""An error tolerance and DBCache's settings: one decides, wherever they are given."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.config.settings import DBCACHE_KNOBS, CacheSettings
from sglang_cachedit_plugin.config.sources import (
    PROFILES,
    FileConfig,
    read_environment,
    read_file,
    read_overrides,
    read_request,
    resolve,
)
from sglang_cachedit_plugin.errors import SettingError

P = "SGLANG_CACHE_DIT_"
BALANCED = PROFILES["balanced"]["error_tolerance"]

MINE = {"mine": {"residual_diff_threshold": 0.2}}


def defaults(env: dict[str, str] | None = None, file: Any = None, put: Any = None) -> Defaults:
    """Settings as a start and a change leave them."""
    environment, _ = read_environment(env or {})
    found = Defaults(environment=environment, file=FileConfig() if file is None else read_file(file))
    found.check_profiles()
    return found if put is None else found.with_overrides(read_overrides(put, profiles=found.start_up_profiles))


@pytest.mark.parametrize(
    ("given", "request_", "enabled", "profile", "tolerance", "threshold"),
    [
        ({"env": {P + "PROFILE": "balanced"}}, None, True, "balanced", BALANCED, 0.24),
        ({"env": {P + "PROFILE": "balanced", P + "ENABLED": "false"}}, None, False, "balanced", BALANCED, 0.24),
        ({"env": {P + "PROFILE": ""}}, None, False, None, None, 0.24),
        ({"env": {P + "PROFILE": "balanced"}}, {"residual_diff_threshold": 0.1}, True, None, None, 0.1),
        ({"env": {P + "RDT": "0.1", P + "ENABLED": "1"}}, {"profile": "balanced"}, True, "balanced", BALANCED, 0.24),
        ({"env": {P + "PROFILE": "fast"}}, {"profile": "balanced"}, True, "balanced", BALANCED, 0.24),
        ({"env": {P + "PROFILE": "balanced"}}, {"error_tolerance": 0.5}, True, "balanced", 0.5, 0.24),
        ({"env": {P + "PROFILE": "balanced"}}, {"error_tolerance": None}, True, None, None, 0.24),
        ({"file": {"profile": "balanced"}}, None, True, "balanced", BALANCED, 0.24),
        ({"file": {"profile": "balanced"}, "env": {P + "PROFILE": "fast"}}, None, True, "balanced", BALANCED, 0.24),
        ({"file": {"profile": "mine", "profiles": {"mine": {"residual_diff_threshold": 0.2}}}}, None, True, "mine",
         None, 0.2),
        ({"file": {"cache_config": {"max_warmup_steps": 2}}, "env": {P + "PROFILE": "balanced"}}, None, True, None,
         None, 0.24),
        ({"put": {"profile": "balanced"}, "env": {P + "RDT": "0.1"}}, None, False, "balanced", BALANCED, 0.24),
        ({"put": {"residual_diff_threshold": 0.1}, "file": {"profile": "balanced"}}, None, True, None, None, 0.1),
        ({"file": {"profile": "balanced"}, "env": {P + "ENABLED": "no"}}, None, False, "balanced", BALANCED, 0.24),
        ({"file": {"profile": "balanced"}, "put": {"enabled": False}}, None, False, "balanced", BALANCED, 0.24),
        ({"file": {"profile": "mine", "profiles": MINE}}, {"error_tolerance": 0.5}, True, None, 0.5, 0.24),
        ({"env": {P + "PROFILE": "mine", P + "WARMUP": "2"}, "file": {"profiles": MINE},
          "put": {"profiles": {"mine": {"error_tolerance": 0.5}}}}, None, True, None, None, 0.24),
        ({}, {"profile": "fast", "error_tolerance": None, "residual_diff_threshold": 0.1}, False, None, None, 0.1),
        ({"env": {P + "ENABLED": "true"}}, None, True, None, None, 0.24),
    ],
)
def test_strongest_source_that_names_either_decides(given, request_, enabled, profile, tolerance, threshold):
    decision = defaults(**given).decide(None, request_)
    found = decision.resolved
    assert (decision.enabled, found.profile) == (enabled, profile)
    assert (found.primary.error_tolerance, found.primary.residual_diff_threshold) == (tolerance, threshold)


def test_origin_of_a_dropped_tolerance_is_the_setting_that_dropped_it():
    found = defaults({P + "PROFILE": "balanced"}).decide(None, {"max_warmup_steps": 6}).resolved
    assert found.origins["error_tolerance"] == "cache_dit_params.max_warmup_steps"
    assert found.config()["error_tolerance"]["value"] is None


@pytest.mark.parametrize(
    ("given", "request_", "line"),
    [
        ({"env": {P + "PROFILE": "balansed"}}, None,
         f"{P}PROFILE = 'balansed' (environment): expected one of: balanced, fast, quality; did you mean 'balanced'?"),
        ({"env": {P + "PROFILE": "balanced", P + "RDT": "0.1"}}, None,
         f"{P}RDT = 0.1 (environment): without effect beside profile balanced, which is an error tolerance, drop one "
         "of the two"),
        ({"env": {P + "ERROR_TOLERANCE": "0.01", P + "SECONDARY_WARMUP": "2"}}, None,
         f"{P}SECONDARY_WARMUP = 2 (environment): without effect beside {P}ERROR_TOLERANCE, drop one of the two"),
        ({"file": {"profile": 3}}, None, "profile = 3 (cache_dit_config): expected the name of a profile"),
        ({"file": {"profile": "mine", "profiles": MINE, "cache_config": {"error_tolerance": 0.1}}}, None,
         "error_tolerance = 0.1 (cache_dit_config cache_config): without effect beside profile mine, which"),
        ({"file": {"profile": "mine"}}, None, "profile = 'mine' (cache_dit_config): expected one of"),
        ({"file": {"profile": "fast", "cache_config": {"max_warmup_steps": 2}}}, None,
         "max_warmup_steps = 2 (cache_dit_config cache_config): without effect beside profile fast"),
        ({}, {"error_tolerance": 0.02, "enable_dmd": True},
         "enable_dmd = True (cache_dit_params): without effect beside error_tolerance"),
        ({}, {"profile": "fast", "secondary": {"Bn_compute_blocks": 1}},
         "Bn_compute_blocks = 1 (cache_dit_params.secondary): without effect beside profile fast"),
        ({"put": {"profile": "fast", "Fn_compute_blocks": 8}}, None,
         "Fn_compute_blocks = 8 (control): without effect beside profile fast"),
    ],
)
def test_both_in_one_source_are_refused_in_one_line(given, request_, line):
    with pytest.raises(SettingError) as error:
        defaults(**given).decide(None, request_)
    assert str(error.value).startswith(line)


@pytest.mark.parametrize("body", [
    {"profile": "fast", "Fn_compute_blocks": 8}, {"profile": "fast", "cache_config": {"enable_dmd": True}},
    {"profile": "fast", "secondary": {"max_warmup_steps": 2}}, {"error_tolerance": 0.1, "scm_preset": "fast"},
    {"profile": "a", "profiles": {"a": {"error_tolerance": 0.1}}, "forecast": "output"},
])
def test_a_change_with_both_is_refused_before_any_request_meets_it(body):
    start_up = defaults()
    with pytest.raises(SettingError, match=r"\(control.*\): without effect beside"):
        read_overrides(body, profiles=start_up.start_up_profiles)


LAYER = st.sampled_from([
    {}, {"error_tolerance": 0.02}, {"error_tolerance": None}, {"profile": "fast"}, {"residual_diff_threshold": 0.1},
    {"enable_taylorseer": True}, {"scm_preset": "fast"}, {"corrector": False}, {"secondary": {"max_warmup_steps": 2}},
])


@given(request_=LAYER, put=LAYER, file=LAYER)
def test_a_tolerance_never_meets_settings_that_it_leaves_without_effect(request_, put, file):
    sections = {
        "profile": file.get("profile"), "secondary": file.get("secondary"),
        "cache_config": {name: value for name, value in file.items() if name not in ("profile", "secondary")},
    }
    found = defaults(file=sections, put=put).decide(None, request_).resolved
    if found.primary.error_tolerance is not None:
        for name in DBCACHE_KNOBS:
            assert getattr(found.primary, name) == getattr(found.secondary, name) == getattr(CacheSettings, name)
    # The corrector goes with both.
    assert found.primary.corrector is not any("corrector" in each for each in (request_, put, file))


NAMES = {"error_tolerance": st.none() | st.floats(0.0, 1.0), "residual_diff_threshold": st.floats(0.0, 1.0),
         "max_warmup_steps": st.integers(0, 9), "forecast": st.sampled_from(["output", "residual"]),
         "scm_preset": st.sampled_from(["none", "fast"]), "lockstep": st.booleans(), "corrector": st.booleans()}


@given(st.lists(st.fixed_dictionaries({}, optional=NAMES), max_size=4))
def test_settings_in_force_are_those_of_the_method_that_the_strongest_source_names(drawn):
    sources = []
    for number, raw in enumerate(drawn):
        if raw.get("error_tolerance") is not None:
            raw = {name: raw[name] for name in raw if name in ("error_tolerance", "corrector")}
        sources.append(read_request(raw, origin=f"s{number}"))
    found = resolve(*sources)
    says = next((each.controls for each in sources if each.controls is not None), False)
    assert (found.primary.error_tolerance is not None) is says
    for name, origin in found.origins.items():
        number, _, key = origin.partition(".")
        if number == "default":
            assert getattr(found.primary, name) == getattr(CacheSettings, name)
        elif name == "error_tolerance" and key != name:
            # Dropped: the origin is the setting that decided.
            assert not says and sources[int(number[1:])].controls is False
        else:
            assert sources[int(number[1:])].primary[name].value == getattr(found.primary, name)
            assert not (says and name in DBCACHE_KNOBS)
