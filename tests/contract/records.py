"""What this plugin meets in each version of SGLang and cache-dit, read from their wheels without running them.

``python -m tests.contract.records sglang-0.5.23-*.whl cache_dit-1.5.1-*.whl ...`` writes records.json: for SGLang the
parameters of every hook point, for both every module, name and attribute of theirs that this package's source
mentions and that the wheel lacks.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sglang_cachedit_plugin import hooks
from sglang_cachedit_plugin.integration.host_contract import mentions, module_file

FILE = Path(__file__).with_name("records.json")
PACKAGE = Path(hooks.__file__).parent


def uses(package: str) -> set[str]:
    """``module:name`` for each name of ``package`` that this package's source imports or takes from what it imports."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found |= set(uses_in(tree, package))
    return found


def uses_in(tree: ast.AST, package: str) -> Iterator[str]:
    """The same of one parsed file."""
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == package:
            for each in node.names:
                bound[each.asname or each.name] = f"{node.module}.{each.name}"
                yield f"{node.module}:{each.name}"
        elif isinstance(node, ast.Import):
            for each in node.names:
                if each.name.split(".")[0] == package:
                    bound[each.asname or each.name.split(".")[0]] = each.name if each.asname else package
                    yield f"{each.name}:"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            yield f"{bound[node.value.id]}:{node.attr}"


class Wheel:
    """An unpacked wheel."""

    def __init__(self, root: Path):
        self.root = root

    def module(self, dotted: str) -> Path | None:
        """The file of a module."""
        return module_file(self.root, dotted)

    def has(self, use: str) -> bool:
        """Whether ``module:name`` is there; attributes of classes and functions are not looked at."""
        dotted, name = use.split(":")
        if self.module(f"{dotted}.{name}") is not None:
            return True
        path = self.module(dotted)
        if path is None:
            # ``module:name`` where module is itself a name of its parent, such as a class.
            parent, _, last = dotted.rpartition(".")
            return bool(parent) and self.has(f"{parent}:{last}")
        return not name or mentions(path, name)

    def point(self, point: hooks.HookPoint) -> list[str] | None:
        """The parameters of a hook point's function, None where it is not there."""
        found = hooks.parameters_of(point, self.root)
        return None if found is None else list(found)


def record(wheel: Path) -> tuple[str, str, dict[str, Any]]:
    """Distribution, version and record of a wheel."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as packed:
        wanted = [n for n in packed.namelist() if n.endswith((".py", "METADATA"))]
        packed.extractall(folder, wanted)
        metadata = next(Path(folder).glob("*.dist-info/METADATA")).read_text(encoding="utf-8")
        name, version = (re.search(rf"^{key}: (.+)$", metadata, re.M)[1] for key in ("Name", "Version"))
        package, unpacked = name.replace("-", "_"), Wheel(Path(folder))
        found: dict[str, Any] = {"missing": sorted(use for use in uses(package) if not unpacked.has(use))}
        if package == "sglang":
            found["cache-dit"] = re.search(r"^Requires-Dist: cache-dit==([\w.]+)", metadata, re.M)[1]
            found["hook_points"] = {point.target: unpacked.point(point) for point in hooks.HOOK_POINTS}
    return name, version, found


def main(wheels: list[str]) -> None:
    """Write the records of these wheels, beside those of other versions."""
    records = json.loads(FILE.read_text()) if FILE.is_file() else {}
    for wheel in wheels:
        name, version, found = record(Path(wheel))
        records.setdefault(name, {})[version] = found
    ordered = {name: dict(sorted(versions.items())) for name, versions in sorted(records.items())}
    FILE.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
