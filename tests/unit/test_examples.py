"""The examples are what they say they are; the server's tests send the same requests."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest
import yaml

from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.config.sources import read_environment

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def test_the_shell_script_parses():
    subprocess.run(["sh", "-n", EXAMPLES / "requests.sh"], check=True, timeout=20)


def test_the_script_for_the_openai_client_asks_for_settings_that_exist():
    tree = ast.parse((EXAMPLES / "openai_client.py").read_text())
    [body] = [each.value for each in ast.walk(tree) if isinstance(each, ast.keyword) and each.arg == "extra_body"]
    names = [key.value for key in body.keys]
    inner = body.values[names.index("cache_dit_params")]
    request = {"enable_cache_dit": True, "cache_dit_params": {key.value: "balanced" for key in inner.keys}}
    Defaults().check(request)


def test_files_that_compose_mounts_are_there_and_its_settings_are_read():
    services = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())["services"]
    assert (ROOT / services["sglang"]["build"]["dockerfile"]).is_file()
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (EXAMPLES / source).exists(), source
    assert read_environment(services["sglang"]["environment"])[0].profile == "balanced"


@pytest.mark.parametrize("name", ["prometheus.yaml", "grafana.yaml"])
def test_configuration_of_the_other_services_is_yaml(name):
    assert isinstance(yaml.safe_load((EXAMPLES / name).read_text()), dict)
