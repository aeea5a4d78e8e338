"""One host in one process for all cases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .harness import started


@pytest.fixture(scope="package", autouse=True)
def host() -> Iterator[None]:
    with started():
        yield
