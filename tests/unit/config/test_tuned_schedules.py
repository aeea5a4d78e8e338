"""Tuned schedules in files and requests: what is accepted, what is refused and with which words."""

from __future__ import annotations

import pytest
import yaml

from sglang_cachedit_plugin.config.sources import read_file, read_request, resolve
from sglang_cachedit_plugin.config.tuned_schedules import Rows
from sglang_cachedit_plugin.errors import SettingError

ROW = {
    "steps": 4, "size": "128x64", "mask": "1010", "uncond_mask": "1000", "order": 2, "damping": 0.5,
    "weights": [[1.0], [-0.5, 1.5]], "timesteps": [1000.0, 900.0, 500, 1.5],
}


def read(**changes):
    return Rows().check("schedules", [{**ROW, **changes}], "tuned.yaml")


def test_a_row_in_yaml_is_read_as_it_was_written():
    (row,) = read()
    assert (row.steps, row.size, row.mask, row.uncond_mask) == (4, (128, 64), (1, 0, 1, 0), (1, 0, 0, 0))
    assert row.weights == ((1.0,), (-0.5, 1.5))
    text = yaml.safe_dump({"profiles": {"tuned": {"schedules": [ROW]}}})
    again = read_file(yaml.safe_load(text)).profiles["tuned"].primary["schedules"].value
    assert again == (row,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask": "0110"}, r"schedules\[0\].mask = '0110' \(tuned.yaml\): expected 0 and 1 for each step, the first 1"),
        ({"mask": "10101"}, r"schedules\[0\].mask = '5 entries' .*expected 4, one a step"),
        ({"mask": "10a0"}, r"schedules\[0\].mask = '10a0'"),
        ({"maks": "1010"}, r"schedules\[0\].maks = .*unknown key; did you mean 'mask'"),
        ({"size": "128"}, r"schedules\[0\].size = '128' .*width and height"),
        ({"size": "128x0"}, r"schedules\[0\].size"),
        ({"steps": 0}, r"schedules\[0\].steps = 0 .*from 1 to"),
        ({"steps": True}, r"schedules\[0\].steps = True"),
        ({"order": 4}, r"schedules\[0\].order = 4 .*from 1 to 3"),
        ({"damping": 1.1}, r"schedules\[0\].damping = 1.1 .*from 0 to 1"),
        ({"weights": [[1.0]]}, r"schedules\[0\].weights = '1 lists' .*expected 2, one for each 0 of the mask"),
        ({"weights": [[1.0], [float("nan")]]}, r"schedules\[0\].weights"),
        ({"weights": [[1.0], [0.1] * 5]}, r"schedules\[0\].weights .*1 to 4 numbers"),
        ({"timesteps": [4, 3, 3, 1]}, r"schedules\[0\].timesteps .*falling"),
        ({"timesteps": [4, 3, 2]}, r"schedules\[0\].timesteps = '3 entries'"),
    ],
)
def test_a_bad_row_is_refused_by_field(changes, words):
    with pytest.raises(SettingError, match=words):
        read(**changes)


def test_two_rows_for_the_same_requests_are_refused():
    with pytest.raises(SettingError, match=r"schedules\[1\] = '4 steps 128x64' .*already a row"):
        Rows().check("schedules", [ROW, ROW], "tuned.yaml")


def test_a_missing_mask_is_named():
    with pytest.raises(SettingError, match=r"schedules\[0\].mask = None .*missing"):
        Rows().check("schedules", [{"steps": 4}], "tuned.yaml")


def test_schedules_and_another_schedule_of_the_same_source_exclude_each_other():
    with pytest.raises(SettingError, match=r"scm_preset = 'fast' .*excludes schedules"):
        read_request({"schedules": [ROW], "scm_preset": "fast"})


def test_the_strongest_source_decides_on_the_whole_schedule():
    file = read_file({"cache_config": {"schedules": [ROW]}}).source
    asked = resolve(read_request({"scm_preset": "fast"}), file).primary
    assert (asked.schedules, asked.steps_computation_mask) == (None, "fast")
    assert resolve(file).config()["schedules"]["value"] == ["4 steps 128x64"]


def test_spread_of_earlier_files_is_ignored_with_a_warning():
    row = {**ROW, "spread": "whatever"}
    file = read_file({"cache_config": {"schedules": [row, {"steps": 9, "mask": "1" * 9}]}})
    assert file.source.primary["schedules"].value[0] == read_file(
        {"cache_config": {"schedules": [ROW]}}
    ).source.primary["schedules"].value[0]
    assert file.warnings == (
        "spread in schedules (cache_dit_config cache_config) is ignored: error_tolerance takes its place",
    )


def test_online_safety_of_earlier_files_is_refused_with_what_replaced_it():
    with pytest.raises(SettingError, match=r"^max_accumulated_diff = 1\.0 .*error_tolerance takes its place"):
        read_file({"cache_config": {"max_accumulated_diff": 1.0}})
