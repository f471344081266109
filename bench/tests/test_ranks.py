"""Ranks under torchrun: what they report, and how they end."""

import os
from pathlib import Path

import pytest

from bench import ranks

PATIENCE = 600.0  # seconds

WORK = """
import os, pathlib, sys, time
from bench.ranks import report

def main(words):
    what, rank = words[0], os.environ["RANK"]
    pathlib.Path(__file__).with_name("pid-" + rank).write_text(str(os.getpid()))
    if what == "fails" and rank == "1":
        raise KeyError("no such luck")
    if what != "tells":
        time.sleep(1000)
    print("something else")
    if rank == "0":
        report([os.environ[name] for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK")])

main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rank_cases.py").write_text(WORK)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ranks.ROOT}")


def started(folder: Path) -> list[str]:
    return [path.read_text() for path in folder.glob("pid-*")]


def still_there(folder: Path) -> list[str]:
    assert len(started(folder)) == 2
    return [pid for pid in started(folder) if Path("/proc", pid).exists()]


def test_rank_0_reports_among_all_that_is_printed() -> None:
    assert ranks.run(2, ["rank_cases", "tells"], timeout=PATIENCE) == ["2", "2", "0"]


def test_a_rank_that_fails_ends_the_others_and_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="rank_cases ended with status 1, expected 0"):
        ranks.run(2, ["rank_cases", "fails"], timeout=PATIENCE)
    assert "KeyError: 'no such luck'" in capfd.readouterr().err
    assert not still_there(tmp_path)


def test_what_takes_too_long_is_ended(tmp_path: Path) -> None:
    for seconds in (6, 30, 150):  # until both ranks have started before their time is over
        with pytest.raises(TimeoutError, match=f"rank_cases took longer than {seconds} s"):
            ranks.run(2, ["rank_cases", "hangs"], timeout=seconds)
        if len(started(tmp_path)) == 2:
            break
    assert not still_there(tmp_path)


def test_nothing_reported_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="0 lines begin with RESULT"):
        ranks.result(["something else\n"])
