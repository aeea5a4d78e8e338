"""Generated pages are those that the code gives; links of the pages lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_pages_are_current(name):
    assert (ROOT / "docs" / name).read_text() == generate.PAGES[name](), "run: python docs/generate.py"


def test_check_names_the_page_that_is_not_current(monkeypatch, capsys):
    monkeypatch.setattr(generate, "PAGES", {"settings.md": lambda: "other", "models.md": generate.models})
    before = (ROOT / "docs" / "settings.md").read_text()
    assert generate.main(["--check"]) == 1
    assert capsys.readouterr().err.startswith("docs/settings.md: not what the code gives")
    assert (ROOT / "docs" / "settings.md").read_text() == before
    monkeypatch.setattr(generate, "PAGES", {"models.md": generate.models})
    assert generate.main(["--check"]) == 0


def test_a_commit_is_checked_by_what_make_lint_runs():
    recipe = (ROOT / "Makefile").read_text().partition("\nlint: setup\n")[2].partition("\n\n")[0]
    (hooks,) = (repo["hooks"] for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"])
    lines = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    assert [hook["entry"] for hook in hooks] == lines != []


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
