"""Generated cases are the same on every run, a busy machine is no failure, and what is shared goes to one worker."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

SERVERS = ("server", "video_server")
"""Fixtures of a whole session that start a server: their tests stay together whatever their file is."""

FIRST = (
    "server", "test_soak", "test_faults", "test_ranks_host", "test_tune", "test_bench", "test_recipes", "models",
    "e2e", "dist", "contract",
)
"""What takes longest starts first, so that no worker is left with it: parts of the names of groups."""


def group_of(item: pytest.Item) -> str:
    """Tests of a group run on one worker, one after the other: those of a shared server, else those of a file."""
    if (mark := item.get_closest_marker("xdist_group")) is not None:
        return mark.args[0]
    found = item._fixtureinfo.name2fixturedefs
    for name in SERVERS:
        if name in found and found[name][-1].scope == "session":
            return name
    return item.nodeid.partition("::")[0]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test its group, and put the longest first."""
    ranks = {}
    for index, item in enumerate(items):
        group = group_of(item)
        item.add_marker(pytest.mark.xdist_group(group))
        rank = next((rank for rank, part in enumerate(FIRST) if part in group), len(FIRST))
        ranks[item] = (rank, index)
    items.sort(key=ranks.__getitem__)
