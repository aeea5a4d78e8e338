"""The offline engine: settings of each request, its report in the result, a bad setting as an error."""

from __future__ import annotations

import json

import pytest

from tests.e2e.conftest import free_ports
from tests.processes import host_environment, run

BINS = {
    "SGLANG_CACHE_DIT_SCM_COMPUTE_BINS": "4,2,2", "SGLANG_CACHE_DIT_SCM_CACHE_BINS": "2,2",
    "SGLANG_CACHE_DIT_SCM_POLICY": "static",
}


@pytest.fixture(scope="module")
def reports(models, tmp_path_factory):
    """Reports by name of the request; see offline.py."""
    out = tmp_path_factory.mktemp("offline") / "out.json"
    _, master, scheduler, _ = free_ports(4)
    done = run(
        ["-m", "tests.e2e.offline", models["flux"], out, "diffusers", master, scheduler],
        env=host_environment(**BINS), timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text())


def cond(report: dict) -> dict:
    return report["transformers"]["transformer"]["branches"]["cond"]


def test_the_environments_schedule_and_its_absence(reports):
    assert cond(reports["bins of the environment"])["cached"] == [4, 5, 8, 9]
    none = reports["preset none"]
    assert none["config"]["scm_compute_bins"] == {"value": None, "origin": "default"}
    assert none["config"]["max_warmup_steps"]["value"] == 2
    # Without a schedule every step after the warmup is measured.
    assert cond(none)["residual_diffs"] and cond(none)["cached"] != [4, 5, 8, 9]


def test_a_profile_and_the_switch(reports):
    assert (reports["profile"]["profile"], reports["profile"]["backend"]) == ("fast", "diffusers")
    assert reports["profile"]["cached_steps"] > 0
    assert (reports["off"]["enabled"], reports["off"]["reason"]) == (False, "request")


def test_a_bad_setting_raises_in_one_line_and_the_engine_goes_on(reports):
    assert reports["bad"] == (
        "SettingError: max_warmup_stepz = 1 (cache_dit_params): unknown key; did you mean 'max_warmup_steps'?"
    )
    assert reports["refused"].startswith(
        "RefusedError: cache-dit refuses the request: strict = True (cache_dit_params.strict): Fn_compute_blocks 99 + "
    )
    steps = [cond(reports[name]) for name in ("profile", "after the bad one")]
    assert steps[0] == steps[1]
