"""The ranks that other tests send work to: fresh for every job, and replaced when they hang or die."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pool_work as work
from placing import Place, gpus_of, place, visible
from pool import PATIENCE, Pool, RankError

pytestmark = pytest.mark.cpu_ranks  # which may die and hang without harm to a GPU


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def ends(pid: int) -> bool:
    deadline = time.monotonic() + PATIENCE  # only ends a hang
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


def test_ranks_form_a_group_answer_in_order_and_stay(pool: Pool) -> None:
    before = pool.run(4, work.process)
    for world in (1, 2, 5, 8):
        assert pool.run(world, work.reduce_ranks) == [(r, world, world * (world + 1) / 2) for r in range(world)]
    assert pool.run(2, work.process) == before[:2]
    assert len({*before, os.getpid()}) == 5


def test_variables_of_torchrun(pool: Pool) -> None:
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MINE"
    assert pool.run(2, work.environment, *names) == [["0", "2", "0", "2", None], ["1", "2", "1", "2", None]]
    assert pool.run(4, work.environment, *names, LOCAL_WORLD_SIZE=2, MINE="1")[3] == ["3", "4", "1", "2", "1"]


def test_jobs_begin_alike(pool: Pool) -> None:
    first = pool.run(2, work.numbers)
    assert first[0] == first[1]
    pool.run(2, work.disturb)
    assert pool.run(2, work.state) == [(True, torch.float32, 1, None)] * 2
    assert pool.run(2, work.numbers) == first


def test_warnings_are_errors_as_in_the_test_that_asks(pool: Pool) -> None:
    assert [type(error) for error in pool.errors(2, work.warn)] == [UserWarning] * 2


def test_errors_come_back_as_they_were(pool: Pool) -> None:
    errors = pool.errors(3, work.refuse, 0, 1, 2)
    assert [(type(error), str(error)) for error in errors] == [(ValueError, f"got rank {rank}") for rank in range(3)]
    assert "in refuse" in errors[1].__notes__[0]


def test_a_rank_that_does_not_raise_is_an_error(pool: Pool) -> None:
    with pytest.raises(RankError, match="an exception on every rank") as caught:
        pool.errors(3, work.refuse, 0, 2)
    assert "rank 1 returned" in str(caught.value)
    with pytest.raises(RankError, match="on every rank: no rank raised"):
        pool.errors(2, work.refuse)


def test_a_rank_that_dies_is_named_before_those_that_miss_it_and_is_replaced(pool: Pool) -> None:
    with pytest.raises(RankError, match=r"^rank 1 died first: exit code 3"):
        pool.run(3, work.die, 1)
    assert pool.run(3, work.reduce_ranks)[0] == (0, 3, 6.0)


def test_a_rank_that_hangs_is_shown_and_killed(pool: Pool) -> None:
    before = pool.run(2, work.process)
    with pytest.raises(RankError, match=r"not every rank was back after 0\.5 s") as caught:
        pool.run(2, work.wait_forever, 1, timeout=0.5)
    assert "rank 1 hung" in str(caught.value)
    assert ends(before[1])
    assert pool.run(2, work.reduce_ranks) == [(0, 2, 3.0), (1, 2, 3.0)]


@pytest.mark.deep
def test_no_process_outlives_tests_that_were_killed(tmp_path: Path) -> None:
    program = (
        "import pool_work as work\nfrom pool import Pool\npool = Pool(2)\n"
        "print(*pool.run(2, work.process), flush=True)\npool.run(2, work.wait_forever, 1)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # what was killed leaves its folder there
    run = [sys.executable, "-c", program]
    with subprocess.Popen(run, cwd=Path(__file__).parent, env=environment, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout
        ids = [int(word) for word in tests.stdout.readline().split()]
        assert len(ids) == 2
        tests.kill()
        assert all(map(ends, ids))


def test_ranks_have_a_gpu_each_or_share_them_or_are_on_the_cpu() -> None:
    assert [place(world, "") for world in (1, 8)] == [Place.CPU] * 2
    assert [place(world, "01") for world in (1, 2, 3)] == [Place.GPU, Place.GPU, Place.SHARED]
    assert [place(world, "01", sharing=False) for world in (1, 2, 3)] == [Place.GPU, Place.GPU, Place.CPU]
    assert gpus_of(2, "79", Place.GPU) == ["7", "9"]
    assert gpus_of(2, "79", Place.CPU) == ["", ""]
    assert gpus_of(4, "79", Place.SHARED) == ["7", "9", "7", "9"]
    assert gpus_of(3, "79", Place.SHARED) == ["7"] * 3, "mics.init refuses one rank alone beside two that share"
    assert visible(2, {}) == ["0", "1"]
    assert visible(2, {"CUDA_VISIBLE_DEVICES": "3,GPU-5"}) == ["3", "GPU-5"]
    assert visible(0, {"CUDA_VISIBLE_DEVICES": ""}) == []


def test_workers_that_share_a_gpu_are_replaced_when_their_job_did_not_return() -> None:
    with Pool(2, gpus=["7"]) as pool:
        first = pool.run(2, work.process)
        assert pool.run(2, work.process) == first
        pool.errors(2, work.refuse, 0, 1)
        assert not {*first} & {*pool.run(2, work.process)}


def test_each_rank_sees_its_own_gpu_alone_and_other_workers_are_cpu_ranks() -> None:
    """No GPU is needed to see what ranks are told."""
    names = "RANK", "CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
    with Pool(3, gpus=["7", "9"]) as pool:
        first = pool.run(2, work.environment, *names)
        assert first == [["0", "7", "0", "2"], ["1", "9", "0", "2"]]
        assert pool.run(2, work.default_device) == ["cpu"] * 2
        more = pool.run(3, work.environment, *names, LOCAL_WORLD_SIZE=1)
        assert more == [[str(rank), "7", "0", "1"] for rank in range(3)]
        assert pool.used == {Place.GPU, Place.SHARED}
        pool.sharing = False
        assert pool.run(3, work.environment, *names)[2] == ["2", "", "2", "3"]
        pool.only_cpus = True
        assert pool.run(2, work.environment, *names) == [["0", "", "0", "2"], ["1", "", "1", "2"]]
