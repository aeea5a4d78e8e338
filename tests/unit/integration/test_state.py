"""What changes after import is kept in few named places; all else of a module is as it was written."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import sglang_cachedit_plugin

PACKAGE = Path(sglang_cachedit_plugin.__file__).parent
KEPT = {
    ("config.effective", "_current"): "the settings in force in this process",
    ("integration.request", "WORKER"): "the request under way, and the models of this process",
    ("serving.state", "_current"): "the server of this process, which hooks are not told",
}
CHANGES = {
    "add", "append", "appendleft", "clear", "discard", "extend", "insert", "move_to_end", "pop", "popitem", "popleft",
    "remove", "reverse", "setdefault", "sort", "update",
}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def bound(tree: ast.Module) -> dict[str, ast.expr | None]:
    """Names that a module binds to values of its own, with the values."""
    found: dict[str, ast.expr | None] = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {each.id: getattr(node, "value", None) for each in targets if isinstance(each, ast.Name)}
    return found


def name_of(node: ast.expr) -> str | None:
    """The name at the root of ``a``, ``a[...]`` and ``a.b[...].c``."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def changed(function: ast.AST) -> Iterator[str]:
    """Names whose value a function changes in place, or binds anew for the module."""
    for node in ast.walk(function):
        if isinstance(node, ast.Global):
            yield from node.names
        targets = {ast.Assign: "targets", ast.Delete: "targets"}.get(type(node))
        written = getattr(node, targets) if targets else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.Delete | ast.AugAssign | ast.AnnAssign):
            yield from (name for each in written if not isinstance(each, ast.Name) and (name := name_of(each)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            yield from filter(None, [name_of(node.func.value)])


def local(function: ast.AST) -> set[str]:
    """Names that are a function's own."""
    arguments = {each.arg for node in ast.walk(function) if isinstance(node, ast.arguments) for each in (
        *node.posonlyargs, *node.args, *node.kwonlyargs, *filter(None, (node.vararg, node.kwarg)))}
    stored = {
        node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    declared = {name for node in ast.walk(function) if isinstance(node, ast.Global) for name in node.names}
    return (arguments | stored) - declared


def changing_classes(tree: ast.Module) -> set[str]:
    """Classes whose methods change their instances."""
    found = set()
    for node in (each for each in tree.body if isinstance(each, ast.ClassDef)):
        methods = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name != "__init__"]
        if any("self" in changed(each) for each in methods):
            found.add(node.name)
    return found


def states(trees: dict[str, ast.Module]) -> set[tuple[str, str]]:
    """(module, name) of everything at module level that a function changes."""
    found = set()
    changing = {name: changing_classes(tree) for name, tree in trees.items()}
    for module, tree in trees.items():
        own, imported = bound(tree), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                above = module.split(".")[: -node.level] if module else []
                base = ".".join(filter(None, (*above, node.module)))
                imported |= {each.asname or each.name: (base, each.name) for each in node.names}
        for function in (each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)):
            names = set(changed(function)) - local(function)
            found |= {(module, name) for name in names & set(own)}
            found |= {imported[name] for name in names & set(imported)}
        for name, value in own.items():
            if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and (
                value.func.id in changing[module]
                or value.func.id in changing.get(imported.get(value.func.id, ("", ""))[0], ())
            ):
                found.add((module, name))
    return found


def test_nothing_at_module_level_changes_but_what_is_named():
    found = states(modules())
    assert found == set(KEPT)


def test_each_way_to_change_a_module_is_seen():
    other = ast.parse("current = None\n")
    tree = ast.parse('''
from . import other
from .request import WORKER

class Counter:
    def __init__(self): self.count = 0
    def step(self): self.count += 1

class Fixed:
    def __init__(self): self.value = 1

listed = []
table = {}
bare = None
counter = Counter()
fixed = Fixed()
untouched = {}
shadowed = []

def change(shadowed):
    global bare
    bare = 1
    listed.append(1)
    table["a"]["b"] = 2
    other.current = 3
    WORKER.active = 4
    shadowed.append(5)
    return untouched["a"]
''')
    assert states({"other": other, "room": tree, "request": ast.parse("WORKER = 1")}) == {
        ("room", "bare"), ("room", "listed"), ("room", "table"), ("room", "counter"), ("", "other"),
        ("request", "WORKER"),
    }
