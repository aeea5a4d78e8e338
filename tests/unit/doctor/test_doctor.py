"""The doctor's findings, its exit status, and that it loads nothing heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from sglang_cachedit_plugin import cli, hooks
from sglang_cachedit_plugin.doctor import report
from sglang_cachedit_plugin.integration import host_contract


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SGLANG_")]:
        monkeypatch.delenv(name)


def run(capsys, *arguments: str) -> tuple[int, dict]:
    status = cli.main(["doctor", "--json", *arguments])
    return status, json.loads(capsys.readouterr().out)


def test_an_installation_in_order(capsys):
    status, found = run(capsys)
    assert (status, found["ok"], found["problems"]) == (0, True, [])
    assert [point["target"] for point in found["hook_points"]] == [point.target for point in hooks.HOOK_POINTS]
    assert all(point["found"] for point in found["hook_points"])
    assert found["versions"]["sglang"] and found["versions"]["cache-dit"] and found["versions"]["torch"]
    assert found["settings"]["enabled"] == {"value": False, "origin": "default"}


def test_settings_in_force_with_origins(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SGLANG_CACHE_DIT_WARMUP", "2")
    file = tmp_path / "cache.yaml"
    file.write_text("cache_config: {residual_diff_threshold: 0.5}\nprofiles: {draft: {max_warmup_steps: 1}}\n")
    status, found = run(capsys, "--config", str(file))
    config = found["settings"]["config"]
    assert status == 0
    assert config["max_warmup_steps"] == {"value": 2, "origin": "SGLANG_CACHE_DIT_WARMUP"}
    assert config["residual_diff_threshold"]["value"] == 0.5
    assert config["residual_diff_threshold"]["origin"].startswith("cache.yaml")
    assert found["settings"]["enabled"] == {"value": True, "origin": "cache.yaml"}
    assert "draft" in found["settings"]["profiles"]


def test_a_bad_variable_is_one_line_and_status_1(capsys, monkeypatch):
    monkeypatch.setenv("SGLANG_CACHE_DIT_RDT", "abc")
    assert cli.main(["doctor"]) == 1
    errors = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "SGLANG_CACHE_DIT_RDT = 'abc' (environment): expected a number from 0 to 1" in errors[0]


def test_a_bad_file_is_status_1(capsys, tmp_path):
    file = tmp_path / "cache.yaml"
    file.write_text("cache_config: {max_warmup_stepz: 4}\n")
    status, found = run(capsys, "--config", str(file))
    assert status == 1 and found["settings"] is None
    assert "did you mean 'max_warmup_steps'" in found["problems"][0]
    assert run(capsys, "--config", str(tmp_path / "none.yaml"))[0] == 1


def test_a_host_that_differs_is_status_1(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(hooks, "host_root", lambda: tmp_path)
    status, found = run(capsys)
    assert status == 1
    assert not any(point["found"] for point in found["hook_points"])
    assert len(found["problems"]) == len(hooks.HOOK_POINTS) + len(host_contract.NAMES)


def test_what_is_not_installed_is_said(capsys, monkeypatch):
    monkeypatch.setattr(report.sglang_api, "version", lambda name: None)
    monkeypatch.setattr(report.metadata, "entry_points", lambda **_: ())
    status, found = run(capsys)
    assert status == 1
    assert "cache-dit is not installed" in found["problems"]
    assert any("entry point" in problem for problem in found["problems"])


def test_an_allow_list_without_the_plugin_is_a_problem(capsys, monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    status, found = run(capsys)
    assert status == 1 and "leaves out cachedit" in found["problems"][0]
    monkeypatch.setenv("SGLANG_PLUGINS", "other, cachedit")
    assert run(capsys)[0] == 0


def test_an_untried_host_is_a_warning(capsys, monkeypatch):
    monkeypatch.setattr(report.sglang_api, "version", lambda name: "0.5.99")
    status, found = run(capsys)
    assert status == 0 and "sglang 0.5.99 was not tried" in found["warnings"][0]


def test_it_imports_neither_torch_nor_the_hosts_runtime():
    code = (
        "import sys; from sglang_cachedit_plugin import cli; cli.main(['doctor']);"
        "bad = [m for m in sys.modules if m.startswith(('sglang.', 'torch', 'cache_dit', 'diffusers'))];"
        "sys.exit(str(bad) if bad else 0)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SGLANG_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
