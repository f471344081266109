"""Records of trees with changes: the pages keep what they had, a sentence says why, and a user may take them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import all as every
from bench import report
from bench.all import Part
from bench.record import Commit
from bench.report import rebuilt, refused

PAGE = "".join(f"<!-- bench:{name} -->\nold\n<!-- /bench -->\n" for name in ("host", "links", "weak"))
OLD, NEW = "2001-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"


def found(command: str, *, dirty: bool | None, date: str = OLD, **figures: Any) -> dict[str, Any]:
    machine = {"device": "a core", "cores": 1}
    commit = {"hash": "0123456789", "dirty": dirty}
    return {
        "command": f"python -m bench.{command}",
        "commit": commit,
        "machine": machine,
        "date": date,
        "load": 0.5,
        **figures,
    }


def host(*, dirty: bool | None, date: str = OLD) -> dict[str, Any]:
    return found("host", dirty=dirty, date=date, microseconds={"mics": {"median": 1e-6}}, cost_per_unit={"mics": 1})


def links(*, dirty: bool | None, date: str = OLD) -> dict[str, Any]:
    return found("links --sizes 8", dirty=dirty, date=date, rows=[])


Told = Callable[[dict[str, Any]], Path]


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    """A page that shows the records it is told; where it lies."""

    def told(records: dict[str, Any]) -> Path:
        monkeypatch.setattr(report, "read", lambda: records)
        monkeypatch.setattr(report, "ROOT", tmp_path)
        monkeypatch.setattr(report, "PAGES", ("page.md",))
        path = tmp_path / "page.md"
        path.write_text(PAGE)
        return path

    return told


def old(path: Path) -> list[str]:
    """Tables that are as they were."""
    text = path.read_text()
    return [name for name in ("host", "links", "weak") if f"bench:{name} -->\nold\n<" in text]


def test_a_page_keeps_the_table_of_a_refused_record_and_renews_the_others(
    page: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    path = page({"cpu/host": host(dirty=False), "cpu/links": links(dirty=True)})
    assert report.main([]) == 1
    assert old(path) == ["links"]
    assert "*commit 0123456, a core, 1 cores, load 0.5 at the start.*" in path.read_text()
    out, err = capsys.readouterr()
    assert out == "renewed: page.md\n"
    assert err.count("\n") == 1
    assert "expected a clean commit: cpu/links (python -m bench.links --sizes 8); " in err
    assert err.endswith("take it all the same with python -m bench.report --dirty NAME ... (or all)\n")


@pytest.mark.parametrize("words", [["cpu/links"], ["cpu/host", "cpu/links"], ["all"]])
def test_a_user_may_take_it_and_the_page_says_so(page: Told, words: list[str]) -> None:
    path = page({"cpu/host": host(dirty=False), "cpu/links": links(dirty=True)})
    assert report.main(["--dirty", *words]) == 0
    assert old(path) == []
    assert path.read_text().count("*commit 0123456 with changes, a core, 1 cores, load 0.5") == 1
    assert path.read_text().count("*commit 0123456, a core, 1 cores, load 0.5") == 1


def test_to_take_one_does_not_take_another(page: Told, capsys: pytest.CaptureFixture[str]) -> None:
    path = page({"cpu/host": host(dirty=True), "cpu/links": links(dirty=True)})
    assert report.main(["--dirty", "cpu/host"]) == 1
    assert old(path) == ["links"]
    assert "cpu/host" not in capsys.readouterr().err


def test_names_of_no_record_are_refused(page: Told, capsys: pytest.CaptureFixture[str]) -> None:
    path = page({"cpu/host": host(dirty=True)})
    with pytest.raises(SystemExit):
        report.main(["--dirty", "host"])
    assert "--dirty got host, expected all or some of cpu/host" in capsys.readouterr().err
    assert path.read_text() == PAGE


def test_checking_changes_nothing(page: Told) -> None:
    path = page({"cpu/host": host(dirty=False)})
    assert report.main(["--check"]) == 1
    assert path.read_text() == PAGE
    assert report.main([]) == 0
    assert old(path) == []
    assert report.main(["--check"]) == 0


def test_a_check_fails_for_a_refused_record_on_a_page_that_is_up_to_date(page: Told) -> None:
    page({"cpu/host": host(dirty=True)})
    assert report.main(["--dirty", "all"]) == 0
    assert report.main(["--check", "--dirty", "all"]) == 0
    assert report.main(["--check"]) == 1


def test_a_table_of_several_records_is_kept_for_one_of_them() -> None:
    assert rebuilt(PAGE, {}, ["cluster/weak-2"]) != PAGE  # there is none, so that nothing is refused
    records = {"cluster/weak-2": {}, "cpu/host": host(dirty=False)}
    assert "bench:weak -->\nold\n<" in rebuilt(PAGE, records, ["cluster/weak-2"])


def test_records_that_no_table_shows_or_that_nobody_knows_more_of_are_not_refused() -> None:
    assert refused({"cpu/kernels-quick": found("kernels --quick", dirty=True)}) == []
    assert refused({"cpu/host": host(dirty=None)}) == []  # the tree came without its history
    assert refused({"h200/training": found("training", dirty=True)}) == ["h200/training"]


def run_all(monkeypatch: pytest.MonkeyPatch, *, dirty: bool = False, program: str = "") -> int:
    """`python -m bench.all it`, where the part runs this program."""
    monkeypatch.setattr(every, "PARTS", (Part("it", ("-c", program), 1),))
    monkeypatch.setattr(every, "PYTHON", [sys.executable])
    monkeypatch.setattr(every, "missing", dict)
    monkeypatch.setattr(every, "commit", lambda: Commit("0123456789", dirty))
    monkeypatch.setattr(every, "changes", lambda _: ["a.py", "b.py", "c.py", "d.py", "e.py"])
    return every.main(["it"])


def test_old_refused_records_are_named_and_fail_nothing(
    page: Told, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = page({"cpu/host": host(dirty=False, date=NEW), "cpu/links": links(dirty=True)})
    assert run_all(monkeypatch) == 0
    assert old(path) == ["links"]
    err = capsys.readouterr().err
    assert (
        "=== from before this run: report: measured on a tree with changes, expected a clean commit: cpu/links" in err
    )
    assert "the tree has changes" not in err


def test_a_run_whose_own_records_are_refused_says_so_first_and_fails(
    page: Told, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = page({"cpu/host": host(dirty=True, date=NEW), "cpu/links": links(dirty=False)})
    assert run_all(monkeypatch, dirty=True) == 1
    assert old(path) == ["host"]
    err = capsys.readouterr().err
    first, *_, last = [line for line in err.splitlines() if line]
    assert first.startswith("=== the tree has changes (a.py, b.py, c.py and 2 more), so the pages will refuse what is")
    assert "expected a clean commit: cpu/host (python -m bench.host)" in last


def test_a_part_that_fails_does_not_keep_the_pages_from_being_renewed(
    page: Told, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = page({"cpu/host": host(dirty=False), "cpu/links": links(dirty=True)})
    assert run_all(monkeypatch, program="raise SystemExit(3)") == 1
    assert old(path) == ["links"]
    assert capsys.readouterr().err.endswith("=== it: failed with status 3\n")
