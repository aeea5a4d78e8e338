"""Built-in profiles: which they are, what wins over them, what they make of a request."""

from __future__ import annotations

import pytest

from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.config.sources import BUILT_IN, PROFILES, read_environment, read_file
from sglang_cachedit_plugin.errors import SettingError

TOLERANCES = {"quality": 0.003, "balanced": 0.01, "fast": 0.08}


def test_every_built_in_profile_is_tested():
    assert set(TOLERANCES) == set(BUILT_IN) == set(PROFILES)


@pytest.mark.parametrize("name", TOLERANCES)
def test_a_request_takes_a_built_in_profile(name):
    resolved = Defaults().decide(True, {"profile": name}).resolved
    assert resolved.profile == name
    assert resolved.primary.error_tolerance == TOLERANCES[name]
    assert resolved.secondary == resolved.primary
    assert resolved.origins["error_tolerance"] == f"built-in profiles.{name}.error_tolerance"


def test_a_profile_outranks_file_and_environment_and_the_request_outranks_it():
    environment, _ = read_environment({"SGLANG_CACHE_DIT_FORECAST": "residual", "SGLANG_CACHE_DIT_WARMUP": "7"})
    file = read_file({
        "cache_config": {"steps_computation_mask": "ultra", "forecast_order": 3},
        "profiles": {"own": {"steps_computation_mask": "fast", "forecast": "output"}},
    })
    defaults = Defaults(environment=environment, file=file)
    settings = defaults.decide(None, {"profile": "own", "forecast_order": 2}).resolved.primary
    assert (settings.forecast, settings.steps_computation_mask, settings.forecast_order) == ("output", "fast", 2)
    assert settings.max_warmup_steps == 7
    assert defaults.decide(None, {"profile": "quality"}).resolved.primary.max_warmup_steps == 4


def test_the_files_profile_replaces_the_built_in_one_of_the_same_name():
    file = read_file({"profiles": {"fast": {"residual_diff_threshold": 0.5}, "draft": {}}})
    defaults = Defaults(file=file)
    resolved = defaults.decide(None, {"profile": "fast"}).resolved
    assert resolved.primary.residual_diff_threshold == 0.5
    assert resolved.primary.error_tolerance is None
    assert sorted(defaults.profiles) == ["balanced", "draft", "fast", "quality"]
    assert defaults.decide(None, {"profile": "balanced"}).resolved.primary.error_tolerance == 0.01


def test_a_misspelt_profile_is_refused_with_the_near_name():
    with pytest.raises(SettingError, match=r"profile = 'fsat'.*balanced, fast, quality; did you mean 'fast'"):
        Defaults().decide(True, {"profile": "fsat"})


def test_the_description_names_switch_values_and_profiles():
    nothing = Defaults().describe()
    assert nothing["enabled"] == {"value": False, "origin": "default"}
    environment, _ = read_environment({"SGLANG_CACHE_DIT_ENABLED": "true", "SGLANG_CACHE_DIT_RDT": "0.1"})
    described = Defaults(environment=environment, file=read_file({"profiles": {"a": {}}})).describe()
    # A file that only defines profiles leaves the switch to the environment.
    assert described["enabled"] == {"value": True, "origin": "SGLANG_CACHE_DIT_ENABLED"}
    assert described["config"]["residual_diff_threshold"] == {"value": 0.1, "origin": "SGLANG_CACHE_DIT_RDT"}
    assert described["profiles"] == ["a", "balanced", "fast", "quality"]
