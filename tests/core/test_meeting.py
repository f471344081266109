"""Ranks meet at a store that earlier starts have written to: all of the same start, or none."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from mics_core.comm.meeting import meet
from mics_core.errors import ConfigError, LostRank


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def start(
    server: dist.TCPStore, ranks: Sequence[int], world: int, trouble: dict[int, str] | None = None, seconds: float = 60
) -> list[str]:
    """What each of these ranks reads where rank 0 writes "new" if nothing is there; or its error."""

    def rank_of(rank: int) -> str:
        client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
        try:
            mine = meet(client, rank, world, (trouble or {}).get(rank, ""), timedelta(seconds=seconds)).store
        except (ConfigError, LostRank) as error:
            return str(error)
        if rank == 0:
            mine.set("state", "old" if mine.check(["state"]) else "new")
        return str(mine.get("state").decode())

    with ThreadPoolExecutor(world) as threads:
        return list(threads.map(rank_of, ranks))


def test_no_rank_reads_what_an_earlier_start_wrote(store: dist.TCPStore) -> None:
    for world in (1, 4, 4, 2, 4):
        assert start(store, range(world), world) == ["new"] * world


@pytest.mark.parametrize("gone", [0, 2])
def test_ranks_meet_after_a_start_in_which_one_did_not_come(store: dist.TCPStore, gone: int) -> None:
    said = start(store, [rank for rank in range(4) if rank != gone], 4, seconds=0.5)
    assert all(sentence.startswith("init: ") for sentence in said)
    if gone:
        assert said[0].startswith(f"init: after 0:00:00.500000 ranks [{gone}] of 4 have not come: ")
    assert start(store, range(4), 4) == ["new"] * 4


def test_the_trouble_of_one_rank_is_raised_by_all(store: dist.TCPStore) -> None:
    assert start(store, range(3), 3, {2: "init: no room", 1: "init: no luck"}) == ["init: no luck"] * 3
    assert start(store, range(3), 3) == ["new"] * 3


def placed(server: dist.TCPStore, places: Sequence[str]) -> list[bool | str]:
    """Whether each rank hears that ranks share GPUs; or its error."""

    def rank_of(rank: int) -> bool | str:
        client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
        try:
            return meet(client, rank, len(places), "", timedelta(seconds=60), places[rank]).shared
        except ConfigError as error:
            return str(error)

    with ThreadPoolExecutor(len(places)) as threads:
        return list(threads.map(rank_of, range(len(places))))


def test_all_ranks_hear_alike_whether_they_share_gpus(store: dist.TCPStore) -> None:
    assert placed(store, ["a, GPU 0", "a, GPU 1"]) == [False, False]
    assert placed(store, ["a, GPU 0", "a, GPU 0"]) == [True, True]
    (said,) = set(placed(store, ["a, GPU 0", "a, GPU 0", "a, GPU 1"]))
    assert str(said).startswith("ranks 0 and 1 share a GPU (a, GPU 0), and rank 2 has one of its own (a, GPU 1): ")
