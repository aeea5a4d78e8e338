"""docs/alerts.yaml and docs/grafana.json ask for numbers that the plugin publishes, by labels that these have."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from sglang_cachedit_plugin.report import metrics

DOCS = Path(__file__).parents[3] / "docs"
WHERE = {"transformer", "branch"}
LABELS = {
    metrics.STEPS: {*WHERE, "kind"}, metrics.REQUESTS: {"outcome"}, metrics.NANS: WHERE, metrics.CORRECTED: set(),
    metrics.AGREE: set(), **{f"{metrics.DIFFS}_{part}": {*WHERE, "le"} for part in ("bucket", "sum", "count")},
    **{f"{metrics.COMPUTED}_{part}": {"profile", "le"} for part in ("bucket", "sum", "count")},
}
RULES = [rule for group in yaml.safe_load((DOCS / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
PANELS = json.loads((DOCS / "grafana.json").read_text())["panels"]
QUERIES = [*(rule["expr"] for rule in RULES), *(target["expr"] for panel in PANELS for target in panel["targets"])]


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_asks_for_what_is_there(query):
    asked = re.findall(r"(sglang_cache_dit_\w+)(?:\{([^}]*)\})?", query)
    assert asked and query.count("(") == query.count(")")
    for name, selectors in asked:
        assert set(re.findall(r"(\w+)=", selectors)) <= LABELS[name]
        outcomes = re.search(r'outcome=~?"([^"]*)"', selectors)
        assert outcomes is None or set(outcomes[1].split("|")) <= set(metrics.OUTCOMES)
    common = set.intersection(*(LABELS[name] for name, _ in asked)) | {"instance"}
    for names in re.findall(r"by \(([^)]*)\)", query):
        assert set(names.split(", ")) <= common


def test_rules_and_panels_cover_what_an_operator_must_see():
    assert {rule["alert"] for rule in RULES} == {
        "CacheDitUnavailable", "CacheDitNanDifferences", "CacheDitMoreComputedSteps", "CacheDitWorkersDisagree",
    }
    assert all(rule["annotations"]["summary"] and rule["labels"]["severity"] for rule in RULES)
    shown = {name for query in QUERIES for name in re.findall(r"sglang_cache_dit_\w+", query)}
    assert {metrics.CORRECTED, f"{metrics.COMPUTED}_sum", metrics.AGREE, metrics.NANS} <= shown


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_takes_the_rules():
    subprocess.run(["promtool", "check", "rules", DOCS / "alerts.yaml"], check=True, timeout=60)
