import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pool_work as work
from pool import Pool, RankError


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def ends_soon(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


@pytest.mark.parametrize("world", range(1, 9))
def test_ranks_form_a_group_and_answer_in_order(pool: Pool, world: int) -> None:
    assert pool.run(world, work.reduce_ranks) == [(rank, world, world * (world + 1) / 2) for rank in range(world)]


def test_groups_of_some_ranks(pool: Pool) -> None:
    assert pool.run(8, work.reduce_in_subgroups) == [36.0] * 8


def test_processes_stay(pool: Pool) -> None:
    before = pool.run(4, work.process)
    assert pool.run(2, work.process) == before[:2]
    assert len({*before, os.getpid()}) == 5


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 8), st.lists(st.integers(0, 7)))
def test_hypothesis_sends_what_it_likes(pool: Pool, world: int, values: list[int]) -> None:
    assert pool.run(world, work.echo, values) == [values] * world


def test_tensors_come_back_by_value_whatever_their_size(pool: Pool) -> None:
    for rank, tensor in enumerate(pool.run(2, work.large, 1 << 20)):
        assert tensor.dtype is torch.bfloat16
        assert tensor.shape == (1 << 20,)
        assert not tensor.is_shared()
        assert (tensor == rank).all()
    assert pool.run(2, work.echo, torch.arange(1 << 20))[1].sum() == (1 << 20) * ((1 << 20) - 1) // 2


def test_variables_of_torchrun(pool: Pool) -> None:
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MINE"
    assert pool.run(2, work.environment, *names) == [["0", "2", "0", "2", None], ["1", "2", "1", "2", None]]
    assert pool.run(4, work.environment, *names, LOCAL_WORLD_SIZE=2, MINE="1")[3] == ["3", "4", "1", "2", "1"]
    assert all(pool.run(1, work.environment, "MASTER_ADDR", "MASTER_PORT")[0])


def test_jobs_begin_alike(pool: Pool) -> None:
    first = pool.run(2, work.numbers)
    assert first[0] == first[1]
    pool.run(2, work.disturb)
    assert pool.run(2, work.state) == [(True, torch.float32, 1, None)] * 2
    assert pool.run(2, work.numbers) == first


def test_workers_import_no_triton_by_themselves() -> None:
    with Pool(1) as fresh:
        assert fresh.run(1, work.imported, "triton") == [False]


def test_output_is_passed_on() -> None:
    program = "import pool_work\nfrom pool import Pool\nwith Pool(2) as pool: pool.run(2, pool_work.print_rank)"
    run = [sys.executable, "-c", program]
    said = subprocess.run(run, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert sorted(said.splitlines()) == ["said by rank 0", "said by rank 1"]


def test_warnings_are_errors_as_in_the_test_that_asks(pool: Pool) -> None:
    assert [type(error) for error in pool.errors(2, work.warn)] == [UserWarning] * 2


@pytest.mark.filterwarnings("ignore:care")
def test_warnings_are_ignored_where_the_test_ignores_them(pool: Pool) -> None:
    pool.run(2, work.warn)


def test_errors_come_back_as_they_were(pool: Pool) -> None:
    errors = pool.errors(3, work.refuse, 0, 1, 2)
    assert [(type(error), str(error)) for error in errors] == [(ValueError, f"got rank {rank}") for rank in range(3)]
    assert "in refuse" in errors[1].__notes__[0]
    (error,) = pool.errors(1, work.refuse_in_words_of_its_own)
    assert (type(error), str(error)) == (RankError, "TwoArguments: size 3")


def test_a_rank_that_does_not_raise_is_an_error(pool: Pool) -> None:
    with pytest.raises(RankError, match="an exception on every rank") as caught:
        pool.errors(3, work.refuse, 0, 2)
    assert "rank 1 returned" in str(caught.value)


def test_a_rank_that_hangs_did_not_raise(pool: Pool) -> None:
    with pytest.raises(RankError, match="rank 1 hung"):
        pool.errors(2, work.refuse_while_others_wait, 0, timeout=1)


def test_the_rank_that_failed_first_is_named(pool: Pool) -> None:
    with pytest.raises(RankError, match=r"^rank 2 raised first: Traceback") as caught:
        pool.run(3, work.refuse_later_ranks_first, 0.2)
    assert "rank 0 raised (ValueError: got rank 0)" in str(caught.value)


def test_ranks_that_wait_for_one_that_failed_are_replaced(pool: Pool) -> None:
    before = pool.run(4, work.process)
    with pytest.raises(RankError, match=r"rank 1 raised first(.|\n)*ValueError: not me") as caught:
        pool.run(4, work.refuse_while_others_wait, 1)
    assert str(caught.value).count("in wait_for_the_others") == 3
    after = pool.run(4, work.process)
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True, False, False]


def test_a_rank_that_hangs_is_shown_and_killed(pool: Pool) -> None:
    before = pool.run(2, work.process)
    with pytest.raises(RankError, match=r"not every rank was back after 0\.5 s") as caught:
        pool.run(2, work.wait_forever, 1, timeout=0.5)
    assert "rank 0 returned, rank 1 hung" in str(caught.value)
    assert "in wait_forever" in str(caught.value)
    assert "die_with_parent" not in str(caught.value)
    assert ends_soon(before[1])
    assert pool.run(2, work.reduce_ranks) == [(0, 2, 3.0), (1, 2, 3.0)]


def test_a_rank_that_dies_is_named_before_those_that_miss_it(pool: Pool) -> None:
    with pytest.raises(RankError, match=r"^rank 1 died first: exit code 3"):
        pool.run(3, work.die, 1)
    pool.run(3, work.nothing)


def test_a_group_that_cannot_end_is_given_up(pool: Pool) -> None:
    with pytest.raises(RankError, match="left it"):
        pool.run(2, work.leave_a_collective_behind)
    assert pool.run(2, work.reduce_ranks) == [(0, 2, 3.0), (1, 2, 3.0)]


def test_wrong_requests(pool: Pool) -> None:
    with pytest.raises(ValueError, match="got 9 ranks"):
        pool.run(9, work.nothing)
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        pool.run(1, lambda: None)
    with pytest.raises(RankError, match="pickle"):
        pool.run(1, work.unpicklable)
    pool.run(1, work.nothing)


def test_no_process_outlives_the_pool() -> None:
    with Pool(2) as own:
        ids = own.run(2, work.process)
        assert all(map(is_alive, ids))
    assert all(map(ends_soon, ids))


def test_no_process_outlives_tests_that_were_killed(tmp_path: Path) -> None:
    program = (
        "import pool_work as work\nfrom pool import Pool\npool = Pool(2)\n"
        "print(*pool.run(2, work.process), flush=True)\npool.run(2, work.wait_forever, 1)"
    )
    run = [sys.executable, "-c", program]
    here = Path(__file__).parent
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # what was killed leaves its folder there
    with subprocess.Popen(run, cwd=here, env=environment, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout
        ids = [int(word) for word in tests.stdout.readline().split()]
        time.sleep(0.3)  # now rank 1 hangs
        assert all(map(is_alive, ids))
        tests.send_signal(signal.SIGKILL)
        assert len(ids) == 2
        assert all(map(ends_soon, ids))


def test_what_a_job_costs(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    times = []
    for world in (2, 4, 8):
        pool.run(world, work.reduce_ranks)
        for _ in range(15):
            begun = time.perf_counter()
            pool.run(world, work.reduce_ranks)
            times.append((world, time.perf_counter() - begun))
    begun = time.perf_counter()
    with Pool(8) as fresh:
        fresh.run(8, work.nothing)
        started = time.perf_counter() - begun
    medians = [f"{1e3 * statistics.median(t for w, t in times if w == world):.0f} ms" for world in (2, 4, 8)]
    with capsys.disabled():
        print(f" [a job of 2, 4, 8 ranks: {', '.join(medians)}; 8 new processes: {1e3 * started:.0f} ms]", end="")
