"""The pages' tables come from the records, and from nothing else; all benchmarks run in one command."""

import sys

import pytest

from bench import all as every
from bench.all import PARTS, Part, run
from bench.pages import MARKED, PAGES
from bench.record import ROOT
from bench.report import read, rebuilt
from bench.scenes.table import SCENES
from bench.tables import TABLES


@pytest.mark.parametrize("page", PAGES)
def test_committed_tables_are_what_the_records_say(page: str) -> None:
    """Also of records whose trees had changes: somebody took them then, and the page says so."""
    text = (ROOT / page).read_text("utf-8")
    assert rebuilt(text, read()) == text, "run python -m bench.report"


def test_the_page_of_benchmarks_shows_every_scene() -> None:
    shown = {name for _, name, _ in MARKED.findall((ROOT / "docs" / "benchmarks.md").read_text())}
    weak = {scene.name for scene in SCENES if scene.name.startswith("weak-")}
    assert {scene.name for scene in SCENES} - weak <= shown
    assert "weak" in shown


def test_only_what_is_between_markers_changes() -> None:
    text = "before\n<!-- bench:budget -->\nold\n<!-- /bench -->\nbetween\n<!-- bench:host -->\n<!-- /bench -->\nafter\n"
    new = rebuilt(text, {})
    assert "old" not in new
    assert MARKED.sub("", new) == MARKED.sub("", text)
    assert rebuilt(new, {}) == new
    assert "Not measured yet: host. `python -m bench.host` does." in new


def test_an_unknown_marker_is_refused() -> None:
    with pytest.raises(ValueError, match=r"marker bench:nothing, expected one of goals, peers"):
        rebuilt("<!-- bench:nothing -->\n<!-- /bench -->\n", {})


def test_every_table_says_so_where_nothing_was_measured() -> None:
    for name, table in TABLES.items():
        assert table.make({}), name


PYTHON = [sys.executable, "-c"]


def test_a_part_that_fails_does_not_stop_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    parts = [Part("bad", ("raise SystemExit(3)",), 1), Part("good", ("print('it ran')",), 1)]
    assert run(parts, 600, PYTHON) == {"bad": "failed with status 3"}
    out, err = capfd.readouterr()
    assert "it ran" in out
    assert "part 2 of 2, good: about 1 s" in err


def test_what_cannot_run_or_does_not_fit_is_left_out_and_said() -> None:
    parts = [Part("rootless", (), 1, lambda: "emulated nodes need root"), Part("long", (), 120)]
    trouble = run(parts, 60, PYTHON)
    assert trouble["rootless"] == "left out: emulated nodes need root"
    assert trouble["long"].startswith("left out: it takes about 120 s, and")


def test_all_parts_together_take_less_than_twenty_minutes() -> None:
    assert sum(part.seconds for part in PARTS) <= 20 * 60


def test_what_a_machine_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(every, "left_out", lambda name: f"{name} is not there")
    monkeypatch.setattr(every.torch.cuda, "is_available", lambda: False)
    assert every.missing() == {
        "ZeRO-3": "left out: ZeRO-3 is not there",
        "GPUs": "left out: torch finds none here, so all runs on the CPU",
    }
    monkeypatch.setattr(every, "left_out", lambda _: None)
    monkeypatch.setattr(every.torch.cuda, "is_available", lambda: True)
    assert every.missing() == {}


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        every.main(["nothing"])
    assert "got nothing, expected some of host" in capsys.readouterr().err
