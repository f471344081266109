"""Ranks that share GPUs are found, and worlds in which only some of them do are refused."""

import pytest

from mics_core.comm.placement import shared
from mics_core.errors import ConfigError


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (["", ""], False),
        (["a, GPU 0"], False),
        (["a, GPU 0", "a, GPU 1", "b, GPU 0", "b, GPU 1"], False),
        (["a, GPU 0", "a, GPU 0"], True),
        (["a, GPU 0", "a, GPU 1", "a, GPU 0", "a, GPU 1", "a, GPU 0"], True),
    ],
)
def test_ranks_share_gpus_where_two_of_them_have_the_same_one(places: list[str], expected: bool) -> None:
    assert shared(places, range(len(places))) is expected


def test_a_world_in_which_some_ranks_share_a_gpu_and_one_has_its_own_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ranks 5 and 7 share a GPU \(a, GPU 1\), and rank 6 has one of its own"):
        shared(["a, GPU 1", "a, GPU 0", "a, GPU 1"], (5, 6, 7))


def test_a_world_in_which_one_rank_has_no_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank 1 has no GPU and rank 0 has one \(a, GPU 0\)"):
        shared(["a, GPU 0", ""], (0, 1))
