"""Ways of running what came from outside, none of which the package's source uses; and what it depends on."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import sglang_cachedit_plugin
from sglang_cachedit_plugin.config.sources import _UniqueKeyLoader

PACKAGE = Path(sglang_cachedit_plugin.__file__).parent
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.hub.load", "yaml.full_load",
    "yaml.unsafe_load", "yaml.unsafe_load_all", "subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp",
}
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "ctypes", "runpy"}
BY_NAME = {"hooks.py", "integration/cache_dit_sections.py"}
"""Files that import modules by name: the handlers of hook points, and parts of cache-dit, all written there."""
LOADER = "_UniqueKeyLoader"
"""The one loader given to yaml.load."""
FROM = CALLS | {"yaml.load", "importlib.import_module", "numpy.load"}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(tree: ast.AST) -> list[str]:
    """What of a module's source would run, unpickle or expand something from outside."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: import {n.name}" for n in node.names if n.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{each.name}" for each in node.names]
            found += [f"{node.lineno}: import {n}" for n in names if n.split(".")[0] in MODULES or n in FROM]
        elif isinstance(node, ast.Call):
            found += [f"{node.lineno}: {what}" for what in _call(node)]
    return found


def _call(node: ast.Call) -> list[str]:
    name, keywords = dotted(node.func), {each.arg: each.value for each in node.keywords}
    found = [name] if name in CALLS else []
    for keyword in ("shell", "allow_pickle", "trust_remote_code"):
        value = keywords.get(keyword)
        if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
            found.append(keyword)
    if name in ("np.load", "numpy.load") and "allow_pickle" not in keywords:
        found.append("np.load without allow_pickle=False")
    if name == "yaml.load" and [dotted(each) for each in node.args[1:]] != [LOADER]:
        found.append(name)
    if name.rpartition(".")[2] in ("fromstring", "XML", "XMLParser", "iterparse"):
        found.append(f"{name} reads XML")
    if name.rpartition(".")[2] == "import_module":
        found.append("import_module")
    return found


def test_the_package_runs_nothing_from_outside():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    found = {}
    for path in files:
        problems = faults(ast.parse(path.read_text(encoding="utf-8")))
        if str(path.relative_to(PACKAGE)) in BY_NAME:
            assert any("import_module" in each for each in problems)
            problems = [each for each in problems if "import_module" not in each]
        if problems:
            found[str(path.relative_to(PACKAGE))] = problems
    assert found == {}


@pytest.mark.parametrize("source", [
    "import pickle", "from pickle import loads", "from os import system", "import marshal", "eval(text)", "exec(text)",
    "torch.load(path)", "yaml.load(text)", "yaml.load(text, yaml.Loader)", "from yaml import load", "np.load(path)",
    "subprocess.run(line, shell=True)", "subprocess.run(line, shell=flag)", "np.load(path, allow_pickle=True)",
    "os.system(line)", "ElementTree.fromstring(text)", "Model.from_pretrained(x, trust_remote_code=flag)",
    "importlib.import_module(name)",
])
def test_each_of_them_would_be_found(source):
    assert len(faults(ast.parse(source))) == 1


@pytest.mark.parametrize("source", ["np.load(path, allow_pickle=False)", "re.compile(text)", "net.eval()"])
def test_what_looks_like_them_is_not(source):
    assert faults(ast.parse(source)) == []


def test_the_yaml_loader_makes_plain_values_only():
    assert issubclass(_UniqueKeyLoader, yaml.SafeLoader) and _UniqueKeyLoader.__name__ == LOADER
    with pytest.raises(yaml.YAMLError):
        yaml.load("!!python/object/apply:os.getcwd []", _UniqueKeyLoader)


def test_the_page_sets_text_only():
    page = (PACKAGE / "serving" / "page.html").read_text(encoding="utf-8")
    assert page.count("textContent") >= 4
    ways = (
        r"(inner|outer)HTML", "insertAdjacent", r"document\.write", r"\beval\(", r"new Function", "javascript:",
        "srcdoc", "DOMParser", "createContextualFragment", r"\son\w+\s*=", r"set(Timeout|Interval)\(\s*[\"'`]",
    )
    assert [way for way in ways if re.search(way, page)] == []


def test_the_reports_template_escapes_everything_but_its_own_drawings():
    template = (PACKAGE / "tune" / "report.html.jinja").read_text(encoding="utf-8")
    drawn = re.findall(r"\{\{ (\w+)\s*\|\s*drawn \}\}", template)
    assert drawn == ["panel"] and template.count("drawn") == len(drawn)
    assert not re.search(r"\|\s*safe|autoescape|<script", template)


def test_every_dependency_has_an_upper_bound():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    every = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    assert len(every) >= 8
    unbounded = [
        each for each in every if not any(bound.operator in ("<", "<=", "==") for bound in Requirement(each).specifier)
    ]
    assert unbounded == []
