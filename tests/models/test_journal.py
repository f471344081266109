"""The log of a run: what a resumed run keeps of it, and what a kill in the middle of a line leaves."""

import resource
from pathlib import Path

import pytest

from mics_models.training import journal
from mics_models.training.curves import draw
from mics_models.training.journal import Journal


def write(folder: Path, *steps: int, first: int = 0, tensorboard: bool = False) -> None:
    log = Journal(folder, first=first, tensorboard=tensorboard)
    for step in steps:
        log.write({"step": step, "loss": 1 / step, "tokens_per_second": 10.0})
    log.close()


def test_what_came_after_the_checkpoint_is_dropped_when_a_run_goes_on_from_it(tmp_path: Path) -> None:
    write(tmp_path, 10, 20, 30)
    write(tmp_path, 30, 40, first=20)
    assert [row["step"] for row in journal.read(tmp_path)] == [10, 20, 30, 40]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, 10, 20)
    log = tmp_path / journal.LOG
    log.write_text(log.read_text() + '{"step": 30, "lo')
    assert [row["step"] for row in journal.read(tmp_path)] == [10, 20]
    write(tmp_path, 30, first=20)
    assert [row["step"] for row in journal.read(tmp_path)] == [10, 20, 30]


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 10, 20, 30, tensorboard=True)
    write(tmp_path, 30, first=20, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("tokens_per_second")] == [
        (step, 10) for step in (10, 20, 30)
    ]
    assert [event.step for event in events.Scalars("loss")] == [10, 20, 30]


def test_no_room_for_tensorboard_is_an_error_of_the_write(tmp_path: Path) -> None:
    log = Journal(tmp_path, first=0, tensorboard=True)
    (file,) = (tmp_path / "tensorboard").iterdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 30, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            log.write({"step": 1, "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.close()


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    log = Journal(tmp_path, first=0, tensorboard=False)
    log.write({"step": 1, "norm": float("nan")})
    log.close()
    assert (tmp_path / journal.LOG).read_text() == '{"step": 1, "norm": null}\n'


def test_the_curves_are_a_picture(tmp_path: Path) -> None:
    write(tmp_path, 10, 20)
    draw([row | {"held_out": 3.0} for row in journal.read(tmp_path)], "a run", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
