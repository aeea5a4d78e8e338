"""The short form of ``benchmarks.soak.soak``: eight clients for a minute on a server of their own."""

from __future__ import annotations

import pytest

from benchmarks.soak.soak import report_of, soak, verdict
from tests.tiny.build import flux

SECONDS = 60
SHORT_LIMIT = 3.0
"""MiB a minute; what a minute can tell. The long form allows one."""


@pytest.mark.soak
def test_a_minute_of_mixed_requests_and_changes(tmp_path):
    outcome, wrong, memory = soak(flux(tmp_path, 3, 3), tmp_path, clients=8, seconds=SECONDS, seed=7)
    report = report_of(outcome, wrong, memory)
    assert verdict(report, SHORT_LIMIT) == []
    assert outcome.answers >= 20 and outcome.changes >= 2 and outcome.refused >= 1
