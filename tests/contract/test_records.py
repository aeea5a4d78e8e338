"""Versions of SGLang and cache-dit other than the installed ones, by what was recorded of their wheels."""

from __future__ import annotations

import ast
import json
import multiprocessing
import re
import shutil
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from sglang_cachedit_plugin import hooks, plugin
from sglang_cachedit_plugin.integration import host_contract
from tests.contract import records

RECORDS = json.loads(records.FILE.read_text())
INSTALLED = records.Wheel(hooks.host_root())
OFFLINE = ("tune", "bench", "demo", "doctor", "evaluation")
"""Parts of the package that no server runs."""


def test_the_table_of_versions_is_what_was_recorded():
    assert {name: set(found) for name, found in host_contract.TRIED.items()} == {
        "sglang": set(RECORDS["sglang"]), "cache-dit": set(RECORDS["cache_dit"]),
    }


def test_the_package_can_be_installed_beside_every_version_of_the_table():
    project = tomllib.loads((records.PACKAGE.parent / "pyproject.toml").read_text())["project"]
    bounds = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    for library, tried in host_contract.TRIED.items():
        assert [version for version in tried if version not in bounds[library]] == []


@pytest.mark.parametrize("point", hooks.HOOK_POINTS, ids=lambda point: point.target.rpartition("stages.")[2])
def test_every_recorded_host_has_the_seam(point):
    for version, record in RECORDS["sglang"].items():
        found = record["hook_points"][point.target]
        assert found is not None, version
        assert hooks.difference(point, tuple(found)) is None, version


@pytest.mark.parametrize("version", RECORDS["sglang"])
def test_recorded_hosts_have_all_that_a_server_calls(version):
    missing = {use.replace(":", ".") for use in RECORDS["sglang"][version]["missing"]}
    assert not missing & {f"{module}.{name}" for module, names in host_contract.NAMES.items() for name in names}


@pytest.mark.parametrize("version", RECORDS["cache_dit"])
def test_recorded_cache_dits_have_all_that_is_imported(version):
    assert RECORDS["cache_dit"][version]["missing"] == []


def test_the_installed_host_is_its_record():
    version = metadata.version("sglang")
    own = {point.target: INSTALLED.point(point) for point in hooks.HOOK_POINTS}
    assert own == RECORDS["sglang"][version]["hook_points"]
    assert RECORDS["sglang"][version]["missing"] == [
        use for use in sorted(records.uses("sglang")) if not INSTALLED.has(use)
    ]


def test_the_names_are_those_of_the_source():
    """Everything of SGLang that the serving parts of the package import is looked for, and nothing else."""
    used = set()
    for path in sorted(records.PACKAGE.rglob("*.py")):
        if path.relative_to(records.PACKAGE).parts[0] not in OFFLINE:
            used |= set(records.uses_in(ast.parse(path.read_text()), "sglang"))
    taken = {
        (module, name) for module, name in (use.split(":") for use in used)
        if INSTALLED.module(module) and not INSTALLED.module(f"{module}.{name}")
    }
    assert taken == {(module, name) for module, names in host_contract.NAMES.items() for name in names}


def copied_host(folder: Path) -> Path:
    """The files of the installed host that the plugin looks into."""
    modules = [point.target for point in hooks.HOOK_POINTS] + list(host_contract.NAMES)
    for dotted in modules:
        path = None
        while path is None:
            path = host_contract.module_file(hooks.host_root(), dotted)
            dotted = dotted.rpartition(".")[0]
        target = folder / path.relative_to(hooks.host_root())
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return folder


@pytest.fixture
def unknown_host(monkeypatch, tmp_path):
    """A host of a version that nobody tried; what is registered lies in ``calls``."""
    own = metadata.version
    calls: list = []
    monkeypatch.setattr(host_contract.metadata, "version", lambda name: "0.6.1" if name == "sglang" else own(name))
    root = copied_host(tmp_path)
    monkeypatch.setattr(hooks, "host_root", lambda: root)
    monkeypatch.setattr(hooks, "register", lambda *_: calls.append("registered"))
    return SimpleNamespace(root=root, calls=calls)


def test_an_unknown_host_whose_seams_match_is_used_with_one_line(unknown_host, capsys):
    plugin.register()
    assert unknown_host.calls == ["registered"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "sglang 0.6.1 was not tried" in lines[0] and "so it works" in lines[0]


def test_spawned_workers_do_not_repeat_the_line(unknown_host, capsys, monkeypatch):
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    plugin.register()
    assert unknown_host.calls == ["registered"] and capsys.readouterr().err == ""


@pytest.mark.parametrize(("module", "old", "new", "said"), [
    ("runtime/pipelines_core/stages/denoising.py", "def _unmount_cache_dit(self", "def _unmount_cache_dit(self, x",
     "_unmount_cache_dit: expected (self), found (self, x"),
    ("runtime/managers/forward_context.py", "get_forward_context_or_none", "forward_context",
     "forward_context.get_forward_context_or_none: not found"),
    ("runtime/managers/scheduler.py", None, None, "managers.scheduler.Scheduler._dispatch_single_request: no such"),
])
def test_an_unknown_host_that_differs_is_left_alone(unknown_host, capsys, module, old, new, said):
    path = unknown_host.root / "sglang" / "multimodal_gen" / module
    if old is None:
        path.unlink()
    else:
        changed = re.sub(rf"\b{re.escape(old)}", new, path.read_text())
        assert changed != path.read_text()
        path.write_text(changed)
    plugin.register()
    assert unknown_host.calls == []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "left unpatched" in lines[0] and said in lines[0]
