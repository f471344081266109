"""A rank asks for as many open files as its world takes."""

import resource
from collections.abc import Iterator

import pytest

from mics_core.comm.launched import make_room_for_connections


@pytest.fixture
def limits() -> Iterator[tuple[int, int]]:
    """At first 256, as small as systems have it."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    yield 256, before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_small_world_changes_no_limit(limits: tuple[int, int]) -> None:
    assert make_room_for_connections(0, 8) == ""
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits


def test_a_large_world_raises_the_soft_limit_and_leaves_what_the_program_had(limits: tuple[int, int]) -> None:
    assert make_room_for_connections(1, 200) == ""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft > 3 * 200 + limits[0]
    assert hard == limits[1]


def test_a_world_too_large_for_the_hard_limit_is_refused(limits: tuple[int, int]) -> None:
    said = make_room_for_connections(3, limits[1])
    assert said.startswith(f"init: rank 3 may open {limits[1]} files, expected ")
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits
