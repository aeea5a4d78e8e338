"""Why a request was not cached: every code that can be given is explained, and comes through to the report."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest

import sglang_cachedit_plugin
from sglang_cachedit_plugin.errors import MountError, Reason, reason_of
from sglang_cachedit_plugin.report import reasons
from sglang_cachedit_plugin.report.stats import RequestStats, TransformerStats

PACKAGE = Path(sglang_cachedit_plugin.__file__).parent


def given() -> set[str]:
    """Codes that stand in the source."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
            if name in ("Reason", "reason_of"):
                argument = node.args[name == "reason_of"]
                found |= {argument.value} if isinstance(argument, ast.Constant) else set()
    return found


def test_every_code_is_explained_and_every_explanation_is_of_a_code():
    assert given() == set(reasons.REASONS)
    assert set(reasons.REASONS) > reasons.NOT_WANTED
    page = reasons.page()
    for code, advice in reasons.REASONS.items():
        assert f"\n## {code}\n" in page and advice.sentence in page and advice.what_to_do in page


def test_a_reason_keeps_its_code_on_its_way():
    reason = Reason("no_adapter", "X: nobody knows it")
    assert reason == "X: nobody knows it" and pickle.loads(pickle.dumps(reason)).code == "no_adapter"
    assert reason_of(MountError(reason), "blocks").code == reason.after("stage").code == "no_adapter"
    assert (reason_of(MountError("its blocks differ"), "blocks").code, reason_of(KeyError(), "other")) == (
        "blocks", "KeyError",
    )


@pytest.mark.parametrize("enabled", [True, False])
def test_the_report_lists_each_code_once(enabled):
    stats = RequestStats(backend="native", enabled=enabled)
    transformer = stats.transformers["transformer"] = TransformerStats(steps=2)
    stats.note(Reason("schedule", "left out"))
    stats.note(Reason("schedule", "resampled"))
    transformer.notes.append("cond: forwards cannot be told apart")
    transformer.branch("cond").measured(1, float("nan"))
    further = RequestStats(backend="native", enabled=False, reason=Reason("stage", "it refuses"))
    stats.add_stage("Second", further)
    if not enabled:
        stats.reason = Reason("model", "no transformer")
    report = stats.as_dict()
    expected = ["schedule", "stage", "branches", "nan_diffs"] if enabled else ["model"]
    assert report["reason_codes"] == expected
    assert report["reason"].startswith("left out; resampled; Second: it refuses" if enabled else "no transformer")
