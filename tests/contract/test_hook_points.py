"""The host's hook points are as the table says, and a host that differs is noticed by name."""

from __future__ import annotations

import ast
import inspect
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_cachedit_plugin import hooks, plugin
from sglang_cachedit_plugin.errors import HostContractError
from sglang_cachedit_plugin.integration import host_contract, native, sglang_api

ROOT = hooks.host_root()
TARGETS = [point.target.removeprefix("sglang.multimodal_gen.runtime.") for point in hooks.HOOK_POINTS]
KINDS = {"replace", "around", "after", "before"}


def source_of(point: hooks.HookPoint) -> tuple[Path, list[str]]:
    """The host's file of a hook point, and the qualified name inside it."""
    parts = point.target.split(".")
    for split in range(len(parts) - 1, 0, -1):
        path = Path(*parts[:split]).with_suffix(".py")
        if (ROOT / path).is_file():
            return path, parts[split:]
    raise AssertionError(f"{point.target}: no such file")


def copied(point: hooks.HookPoint, folder: Path) -> tuple[Path, list[str]]:
    path, names = source_of(point)
    (folder / path).parent.mkdir(parents=True)
    shutil.copy(ROOT / path, folder / path)
    return folder / path, names


def function_lines(path: Path, names: list[str]) -> tuple[ast.FunctionDef, list[str]]:
    text = path.read_text(encoding="utf-8")
    body: list = ast.parse(text).body
    for name in names:
        node = next(n for n in body if getattr(n, "name", None) == name)
        body = node.body
    return node, text.splitlines(keepends=True)


def test_the_installed_host_is_as_expected():
    assert hooks.mismatches(ROOT) == []


@pytest.mark.parametrize("point", hooks.HOOK_POINTS, ids=TARGETS)
def test_a_copy_of_the_hosts_file_passes(point, tmp_path):
    copied(point, tmp_path)
    assert hooks.check(point, tmp_path) is None


@pytest.mark.parametrize("point", hooks.HOOK_POINTS, ids=TARGETS)
def test_a_renamed_parameter_is_reported_with_both_signatures(point, tmp_path):
    if not point.parameters:
        pytest.skip("the hook looks at no parameter of this function")
    path, names = copied(point, tmp_path)
    node, lines = function_lines(path, names)
    last = (node.args.kwonlyargs or node.args.args)[-1]
    line = lines[last.lineno - 1]
    lines[last.lineno - 1] = (
        line[: last.col_offset] + "renamed" + line[last.col_offset + len(last.arg) :]
    )
    path.write_text("".join(lines), encoding="utf-8")
    expected = ", ".join(point.parameters)
    found = ", ".join([*point.parameters[:-1], "renamed"])
    assert hooks.check(point, tmp_path) == f"{point.target}: expected ({expected}), found ({found})"


@pytest.mark.parametrize("point", hooks.HOOK_POINTS, ids=TARGETS)
def test_a_removed_function_is_reported(point, tmp_path):
    path, names = copied(point, tmp_path)
    node, lines = function_lines(path, names)
    del lines[node.lineno - 1 : node.end_lineno]
    lines.insert(node.lineno - 1, " " * node.col_offset + "gone = None\n")
    first = min((d.lineno for d in node.decorator_list), default=node.lineno)
    del lines[first - 1 : node.lineno - 1]
    path.write_text("".join(lines), encoding="utf-8")
    assert hooks.check(point, tmp_path) == f"{point.target}: not found"


@pytest.mark.parametrize("point", hooks.HOOK_POINTS, ids=TARGETS)
def test_a_missing_module_is_reported(point, tmp_path):
    assert hooks.check(point, tmp_path) == f"{point.target}: no such module"


def test_all_mismatches_are_listed(tmp_path):
    assert len(hooks.mismatches(tmp_path)) == len(hooks.HOOK_POINTS) + len(host_contract.NAMES)


def test_a_host_that_is_not_installed_is_said_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HostContractError, match="not installed"):
        hooks.host_root()


def test_a_mismatch_leaves_the_host_unpatched(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(hooks, "host_root", lambda: tmp_path)
    monkeypatch.setattr(hooks, "register", lambda *_: pytest.fail("patched all the same"))
    plugin.register()
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert f"{hooks.HOOK_POINTS[0].target}: no such module" in printed


@pytest.fixture(scope="module")
def registry():
    """The host's own registry with its hooks put aside for these tests."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    return HookRegistry, HookType


def resolve(dotted: str):
    """The object at a dotted path of the real host."""
    import importlib

    parts = dotted.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for name in parts[split:]:
            found = inspect.getattr_static(found, name) if inspect.isclass(found) else getattr(found, name)
        return found
    raise AssertionError(dotted)


@pytest.mark.parametrize("point", hooks.HOOK_POINTS, ids=TARGETS)
def test_every_target_resolves_in_the_host_with_the_parameters_of_the_table(point):
    found = resolve(point.target)
    assert inspect.isfunction(found)
    if point.parameters:
        assert tuple(inspect.signature(found).parameters) == point.parameters


@pytest.mark.parametrize("point", hooks.HOOK_POINTS, ids=TARGETS)
def test_every_handler_is_below_the_table_and_takes_what_its_kind_gives(point):
    handler = hooks._resolve(*point.handler.split(":"))
    assert point.handler.split(":")[0].split(".")[0] in ("integration", "serving", "hooks")
    assert point.kind in KINDS
    assert point.why
    extra = {"around": ["original"], "after": ["result"]}.get(point.kind, [])
    names = [*extra, *(point.parameters or ["self"])]
    inspect.signature(handler).bind(*names)
    if point.kind == "replace":
        assert tuple(inspect.signature(handler).parameters) == point.parameters


def test_each_method_of_the_mixin_takes_the_place_of_the_hosts_of_the_same_name():
    methods = {name for name in vars(native.CacheDitDenoisingMixin) if not name.startswith("__")}
    assert methods == {
        point.target.rpartition(".")[2] for point in hooks.HOOK_POINTS
        if point.handler.startswith("integration.native:CacheDitDenoisingMixin.")
    }


def test_hooks_are_registered_under_the_hosts_kinds(registry):
    _, hook_type = registry
    calls = []

    class Recorder:
        @staticmethod
        def register(target, hook, kind):
            calls.append((target, callable(hook), kind))

    hooks.register(Recorder, hook_type)
    assert calls == [(point.target, True, hook_type[point.kind.upper()]) for point in hooks.HOOK_POINTS]


def test_a_hook_hands_its_arguments_to_its_handler():
    point = hooks.HookPoint(
        target="a.b", parameters=(), kind="around", handler="errors:nearest", why="to have one to call"
    )
    assert point.hook()("warmpu", ["warmup", "other"]) == "warmup"


def test_registering_imports_nothing_of_the_hosts_runtime():
    import subprocess
    import sys

    code = (
        "import sys; from sglang_cachedit_plugin import hooks; assert hooks.mismatches(hooks.host_root()) == [];"
        "bad = [m for m in sys.modules if m.startswith(('sglang.', 'torch', 'cache_dit', 'diffusers'))];"
        "print(bad)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.fixture
def own_registry(registry):
    """The host's registry, with hooks of its own; all hook points are hooked and applied."""
    from collections import defaultdict

    made = type("Registry", (registry[0],), {"_hooks": defaultdict(list), "_patched": set()})
    hooks.register(made, registry[1])
    made._patched |= {point.target for point in hooks.HOOK_POINTS}
    return made


REPLACED = [point.target for point in hooks.HOOK_POINTS if point.kind == "replace"]


def replace_by_another(registry, hook_type, target: str) -> None:
    from sglang.srt.plugins.hook_registry import HookSource

    registry.register(target, lambda *args: None, hook_type.REPLACE, source=HookSource("other", "other-package"))


def test_hooks_in_their_place_are_not_spoken_of(own_registry, registry):
    assert hooks.out_of_place(own_registry) == []
    replace_by_another(own_registry, registry[1], hooks.HOOK_POINTS[1].target)
    assert hooks.HOOK_POINTS[1].kind == "around" and hooks.out_of_place(own_registry) == []


@pytest.mark.parametrize("target", REPLACED)
def test_a_replacement_that_came_after_ours_is_named(own_registry, registry, target):
    replace_by_another(own_registry, registry[1], target)
    assert hooks.out_of_place(own_registry) == [f"{target}: the plugin 'other' put its own in place of ours"]


def test_a_replacement_that_came_before_ours_is_not_in_its_way(registry):
    from collections import defaultdict

    made = type("Registry", (registry[0],), {"_hooks": defaultdict(list), "_patched": set(REPLACED)})
    replace_by_another(made, registry[1], REPLACED[0])
    hooks.register(made, registry[1])
    assert not any(problem.startswith(REPLACED[0]) for problem in hooks.out_of_place(made))


def test_a_seam_that_the_host_could_not_hook_is_named(own_registry):
    own_registry._patched.remove(hooks.HOOK_POINTS[3].target)
    target = hooks.HOOK_POINTS[3].target
    assert hooks.out_of_place(own_registry) == [f"{target}: the host could not hook it, see its log"]


def test_a_registry_that_keeps_its_books_otherwise_is_not_judged():
    assert hooks.out_of_place(object()) == []


def test_a_worker_reads_its_settings_then_loads_then_says_once_what_is_wrong(monkeypatch):
    from sglang_cachedit_plugin.integration import startup

    done = []
    monkeypatch.setattr(hooks, "out_of_place", lambda registry: ["a hook point: out of place"])
    monkeypatch.setattr(sglang_api, "logger", lambda: SimpleNamespace(
        warning=lambda text, value: done.append(text % value)))
    monkeypatch.setattr(startup, "ensure_file", lambda server_args: done.append(f"settings of {server_args}"))
    monkeypatch.setattr(native, "check_worker", lambda worker: done.append("model"))
    worker = SimpleNamespace(server_args="these arguments")
    for first in (True, False):
        monkeypatch.setattr(sglang_api, "is_first_rank", lambda first=first: first)
        assert hooks.start_worker(lambda worker: done.append("load"), worker) is None
    assert done == [
        "settings of these arguments", "load", "cache-dit: a hook point: out of place", "model",
        "settings of these arguments", "load", "model",
    ]
