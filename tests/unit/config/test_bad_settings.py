"""The same mistakes at every entrance: environment, config file, request, change of a running server."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from fastapi import HTTPException

from sglang_cachedit_plugin.config import effective
from sglang_cachedit_plugin.config.sources import PREFIX
from sglang_cachedit_plugin.integration import sglang_api, startup
from sglang_cachedit_plugin.serving import validation
from tests.unit.serving.test_control import ADDRESS, client, replicas, start_up

__all__ = ["replicas", "start_up"]

MISTAKES = {
    # name: variables without their prefix, the same as keys, words of the line
    "misspelt": ({"WARMPU": "4"}, {"max_warmup_stepz": 4}, ["did you mean", "4"]),
    "not a number": ({"RDT": "abc"}, {"residual_diff_threshold": "abc"}, ["= 'abc'", "a number from 0 to 1"]),
    "not a whole number": ({"FN": "1.5"}, {"Fn_compute_blocks": 1.5}, ["1.5", "a whole number"]),
    "below its range": ({"WARMUP": "-4"}, {"max_warmup_steps": -4}, ["= -4", "at least 0"]),
    "above its range": ({"TS_ORDER": "7"}, {"taylorseer_order": 7}, ["= 7", "from 1 to 2"]),
    "not a truth": ({"TAYLORSEER": "ja"}, {"enable_taylorseer": "ja"}, ["= 'ja'", "true or false"]),
    "misspelt policy": ({"SCM_POLICY": "statik"}, {"scm_policy": "statik"}, ["= 'statik'", "did you mean 'static'"]),
    "misspelt preset": ({"SCM_PRESET": "fsat"}, {"scm_preset": "fsat"}, ["= 'fsat'", "did you mean 'fast'"]),
    "both calibrators": (
        {"TAYLORSEER": "1", "DMD": "1"}, {"enable_taylorseer": True, "enable_dmd": True}, ["exclude each other"],
    ),
    "bins that do not pair": (
        {"SCM_COMPUTE_BINS": "4,2"}, {"scm_compute_bins": [4, 2]}, ["together or not at all"],
    ),
    "second transformer": ({"SECONDARY_FN": "x"}, {"secondary": {"Fn_compute_blocks": "x"}}, ["= 'x'", "whole number"]),
}
FILE_ONLY = {
    "mask of another length": (
        {"num_inference_steps": 28, "steps_computation_mask": [1, 0, 1]},
        ["steps_computation_mask", "expected 28 entries"],
    ),
    "bins that do not fit": (
        {"num_inference_steps": 28, "scm_compute_bins": [2, 2], "scm_cache_bins": [2]},
        ["scm_compute_bins", "cover 6 steps"],
    ),
}
"""Files alone say for how many steps they are."""


def from_start(capsys, act) -> str:
    """The line of a start that ends with status 2."""
    with pytest.raises(SystemExit) as left:
        act()
    assert left.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("cache-dit: error: ") and line.endswith("\n")
    return line[:-1]


def in_environment(variables, keys, *, monkeypatch, capsys, tmp_path) -> str:
    for name, value in variables.items():
        monkeypatch.setenv(PREFIX + name, value)
    monkeypatch.setattr(sglang_api, "known_variables", lambda: ())
    return from_start(capsys, startup.read_settings)


def in_file(variables, keys, *, monkeypatch, capsys, tmp_path) -> str:
    section = {name: value for name, value in keys.items() if name != "secondary"}
    file = tmp_path / "cache.yaml"
    file.write_text(json.dumps({"cache_config": section | keys.get("secondary", {})}))
    return from_start(
        capsys, lambda: startup.before_launch(SimpleNamespace(cache_dit_config=str(file), backend="sglang"))
    )


def in_request(variables, keys, *, monkeypatch, capsys, tmp_path) -> str:
    with pytest.raises(HTTPException) as caught:
        validation.check("id", enable_cache_dit=True, cache_dit_params=keys)
    assert caught.value.status_code == 400
    return caught.value.detail


def in_change(variables, keys, *, monkeypatch, capsys, tmp_path) -> str:
    answer = client().put(ADDRESS, json=keys)
    assert answer.status_code == 400
    return answer.json()["detail"]


@pytest.mark.parametrize("entrance", [in_environment, in_file, in_request, in_change])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_at_every_entrance_and_changes_nothing(
    name, entrance, replicas, monkeypatch, capsys, tmp_path
):
    variables, keys, words = MISTAKES[name]
    before = effective.current()
    line = entrance(variables, keys, monkeypatch=monkeypatch, capsys=capsys, tmp_path=tmp_path)
    assert line.isprintable()
    assert [word for word in words if word not in line] == [], line
    assert effective.current() is before


@pytest.mark.parametrize("name", FILE_ONLY)
def test_a_schedule_that_does_not_fit_its_own_steps_ends_the_start(name, monkeypatch, capsys, tmp_path):
    keys, words = FILE_ONLY[name]
    line = in_file({}, keys, monkeypatch=monkeypatch, capsys=capsys, tmp_path=tmp_path)
    assert [word for word in words if word not in line] == [], line
