"""Tests that need several ranks: they share one pool of processes, which the first of them starts."""

from collections.abc import Iterator

import pytest

from pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    with Pool() as pool:
        yield pool
