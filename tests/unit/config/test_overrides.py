"""Live changes: checked whole, above the file, below the request."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.config.sources import (
    BUILT_IN,
    Overrides,
    parse_change,
    read_environment,
    read_file,
    read_overrides,
)
from sglang_cachedit_plugin.errors import SettingError

FILE = read_file({
    "cache_config": {"max_warmup_steps": 3, "residual_diff_threshold": 0.5},
    "profiles": {"draft": {"scm_preset": "ultra"}},
})
ENVIRONMENT = read_environment({"SGLANG_CACHE_DIT_MC": "7", "SGLANG_CACHE_DIT_ENABLED": "false"})[0]
START_UP = Defaults(environment=ENVIRONMENT, file=FILE)


def changed(body, start_up=START_UP):
    return start_up.with_overrides(read_overrides(body, profiles=start_up.start_up_profiles))


def in_force(defaults, params=None):
    config = defaults.decide(None, params).resolved.config()
    return {name: (entry["value"], entry["origin"]) for name, entry in config.items()}


def test_a_change_outranks_the_file_and_a_request_outranks_the_change():
    after = changed({"max_warmup_steps": 6, "enabled": True})
    assert in_force(after)["max_warmup_steps"] == (6, "control.max_warmup_steps")
    assert in_force(after)["residual_diff_threshold"][0] == 0.5
    assert in_force(after)["max_continuous_cached_steps"] == (7, "SGLANG_CACHE_DIT_MC")
    assert in_force(after, {"max_warmup_steps": 1})["max_warmup_steps"][0] == 1
    assert in_force(after, {"profile": "quality"})["max_warmup_steps"][0] == 4


@pytest.mark.parametrize(
    ("enabled", "wanted"), [(True, (True, "control")), (False, (False, "control")), (None, (True, "cache_dit_config"))]
)
def test_the_switch(enabled, wanted):
    described = changed({"enabled": enabled}).describe()["enabled"]
    assert (described["value"], described["origin"]) == wanted


def test_settings_may_stand_in_cache_config():
    flat = changed({"max_warmup_steps": 6, "scm_preset": "fast"})
    nested = changed({"cache_config": {"max_warmup_steps": 6, "scm_preset": "fast"}})
    assert flat.describe() == nested.describe()


def test_the_second_transformer():
    after = changed({"secondary": {"max_warmup_steps": 9}})
    assert in_force(after)["secondary.max_warmup_steps"] == (9, "control.secondary.max_warmup_steps")


def test_profiles_of_a_change_can_be_named_and_replace_others():
    after = changed({"profiles": {"mine": {"max_warmup_steps": 8}, "draft": {"scm_preset": "slow"}}})
    assert {"mine", "draft", *BUILT_IN} == set(after.profiles)
    assert in_force(after, {"profile": "mine"})["max_warmup_steps"] == (8, "control.profiles.mine.max_warmup_steps")
    assert in_force(after, {"profile": "draft"})["steps_computation_mask"][0] == "slow"


def test_a_profile_for_requests_that_name_none():
    after = changed({"profile": "draft", "max_warmup_steps": 2})
    assert after.describe()["profile"] == "draft"
    assert after.decide(None, None).resolved.profile == "draft"
    assert in_force(after)["steps_computation_mask"][0] == "ultra"
    assert in_force(after)["max_warmup_steps"][0] == 2


def test_a_request_takes_its_profile_in_place_of_the_servers():
    after = changed({"profile": "fast", "profiles": {"plain": {"max_warmup_steps": 5}}})
    plain = after.decide(None, {"profile": "plain"}).resolved
    assert (plain.profile, plain.primary.forecast, plain.primary.max_warmup_steps) == ("plain", "residual", 5)


def test_without_a_change_all_is_as_at_start_up():
    after = changed({"max_warmup_steps": 6, "enabled": False}).with_overrides(Overrides())
    assert after.describe() == START_UP.describe()
    assert after.fingerprint() == START_UP.fingerprint() != changed({"max_warmup_steps": 6}).fingerprint()


def test_fingerprints_see_profiles():
    one, other = ({"profiles": {"mine": {"max_warmup_steps": steps}}} for steps in (1, 2))
    assert changed(one).fingerprint() != changed(other).fingerprint()


def test_a_request_checked_before_the_change_still_finds_its_profile_once():
    first = changed({"profiles": {"mine": {"max_warmup_steps": 8}}})
    second = first.with_overrides(Overrides())
    assert "mine" not in second.profiles
    assert in_force(second, {"profile": "mine"})["max_warmup_steps"][0] == 8
    with pytest.raises(SettingError):
        second.with_overrides(Overrides()).decide(None, {"profile": "mine"})


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ([], ["body = []", "a mapping"]),
        ("fast", ["body = 'fast'"]),
        ({"enabeld": True}, ["enabeld = True (control)", "did you mean 'enabled'"]),
        ({"enabled": "yes"}, ["enabled = 'yes' (control)", "true or false"]),
        ({"max_warmup_stepz": 1}, ["did you mean 'max_warmup_steps'"]),
        ({"cache_config": {"max_warmup_stepz": 1}}, ["(control.cache_config)", "did you mean 'max_warmup_steps'"]),
        ({"cache_config": {}, "max_warmup_steps": 1}, ["max_warmup_steps = 1", "not both"]),
        ({"cache_config": []}, ["cache_config", "a mapping"]),
        ({"secondary": {"num_inference_steps": 4}}, ["num_inference_steps = 4", "it holds for both transformers"]),
        ({"profile": "drfat"}, ["profile = 'drfat'", "did you mean 'draft'"]),
        ({"profiles": []}, ["profiles = []", "a mapping"]),
        ({"profiles": {"mine": {"taylorseer_order": 7}}}, ["(control.profiles.mine)", "from 1 to 2"]),
        ({"profiles": {"mine": {"profile": "fast"}}}, ["profile = 'fast'"]),
        ({"enable_taylorseer": True, "enable_dmd": True}, ["exclude each other"]),
    ],
)
def test_a_bad_change_is_refused_in_one_line(body, parts):
    with pytest.raises(SettingError) as caught:
        changed(body)
    assert len(str(caught.value).splitlines()) == 1
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"{\"a\": 1, \"a\": 2}", b"{\"a\": NaN}", b"\xff", b"[" * 60_000, b"1" * 60_000 + b"x"]
)
def test_a_body_that_is_not_json_is_refused_in_one_line(text):
    with pytest.raises(SettingError, match="not valid JSON") as caught:
        parse_change(text)
    assert len(str(caught.value).splitlines()) == 1


@settings(max_examples=200, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["enabled", "profile", "profiles", "secondary", "cache_config", "max_warmup_steps", "x"]), inner
    ),
    max_leaves=12,
))
def test_whatever_is_sent_is_taken_or_refused(body):
    try:
        after = changed(body)
    except SettingError:
        return
    assert after.overrides.given == body
    assert after.describe()["config"].keys() >= START_UP.describe()["config"].keys()
