"""Whoever hangs at a disk is named on every rank, and who is slow is waited for."""

from pathlib import Path
from threading import Event, Thread

import pytest

import hang_work as work
from mics_core.checkpoint.at_disk import Task
from pool import Pool

pytestmark = pytest.mark.cpu_ranks  # what hangs is a disk


def test_a_thread_goes_on_as_long_as_its_calls_return() -> None:
    asked, done, end = Event(), Event(), Event()

    def job() -> None:
        asked.wait()
        done.set()
        end.wait()

    task = Task(job)
    while task.looks() < 2:  # until it waits
        pass
    asked.set()
    done.wait()
    assert task.looks() == 0
    end.set()


def test_a_process_that_can_start_no_thread_any_more_does_the_work_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(Thread, "start", start)
    task = Task(lambda: 3)
    assert task.wait(0)
    assert task.result() == 3


@pytest.mark.parametrize("background", [True, pytest.param(False, marks=pytest.mark.deep)])
def test_a_rank_that_hangs_in_a_save_is_named_on_every_rank(pool: Pool, tmp_path: Path, background: bool) -> None:
    for said in pool.run(4, work.save, tmp_path, "hangs", background):
        assert "save: rank 1 got no further in 2 s with writing its part" in said
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["latest", "step-1"]


def test_a_save_that_goes_on_may_take_longer_than_ranks_wait_for_each_other(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(2, work.save, tmp_path, "goes on", True) == ["nothing", "nothing"]
    assert (tmp_path / "step-2" / "manifest.json").is_file()


def test_no_other_save_writes_beside_one_that_hangs(pool: Pool, tmp_path: Path) -> None:
    for hung, refused in pool.run(2, work.hang_at_the_end, tmp_path):
        assert "save: rank 0 got no further in 2 s with publishing the checkpoint" in hung
        assert "save: rank 0 got no further in 2 s with making room in the folder" in refused


@pytest.mark.deep
def test_a_rank_that_does_not_come_is_named(pool: Pool) -> None:
    for rank, said in enumerate(pool.run(4, work.stay_away)):
        assert rank == 1 or "hearing all ranks failed on rank" in said
        assert rank == 1 or "nothing came from rank 1: it does other work" in said


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (
            "settings",
            "save: lr of the optimizer's group 1 is not the same on rank 3 as on rank 2, which alone",
        ),
        ("keep", "save: keep is 0, expected a count from 1 up"),
    ],
)
def test_ranks_of_a_group_are_named_by_their_numbers_in_the_job(
    pool: Pool, tmp_path: Path, what: str, sentence: str
) -> None:
    _, _, second, third = pool.run(4, work.save_in_a_part, tmp_path, what)
    assert sentence in second
    assert sentence in third
    assert what == "settings" or second.startswith("on rank 3: ")
    assert not (tmp_path / "step-1").exists()


@pytest.mark.parametrize(
    ("how", "sentence"),
    [("hangs", "load: rank 1 got no further"), pytest.param("goes on", "nothing", marks=pytest.mark.deep)],
)
def test_threads_that_read_for_a_load_are_watched_too(pool: Pool, tmp_path: Path, how: str, sentence: str) -> None:
    (first, _), (second, refused) = pool.run(2, work.load, tmp_path, how)
    assert first.startswith(sentence)
    assert second.startswith(sentence)
    assert ("would still write to its memory" in refused) == (how == "hangs")
