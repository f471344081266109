"""What makes a tree other than its commit: everything but what benchmarks write themselves."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import record
from bench.pages import PAGES, changes, emptied

RECORD = "bench/results/cpu/host.json"
PAGE = "Words.\n<!-- bench:host -->\nold\n<!-- /bench -->\nMore.\n<!-- bench:links -->\n<!-- /bench -->\n"


def git(root: Path, *words: str) -> None:
    me = ["-c", "user.name=me", "-c", "user.email=me@here", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *me, *words], cwd=root, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with pages, a source and a record, all committed."""
    for name, text in dict.fromkeys(PAGES, PAGE).items() | {("bench/x.py", "x = 1\n"), (RECORD, "{}\n")}:
        write(tmp_path / name, text)
    (tmp_path / ".gitignore").write_text("runs/\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message=all")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def to(name: str, text: str) -> Callable[[Path], object]:
    """Write this file."""
    return lambda root: write(root / name, text)


NEW_TABLES = PAGE.replace("old", "new\nand longer").replace("links -->\n", "links -->\nthe first\n")


BY_BENCHMARKS: dict[str, Callable[[Path], object]] = {
    "nothing": lambda _: None,
    "table": to("README.md", NEW_TABLES),
    "table of docs": to("docs/benchmarks.md", NEW_TABLES),
    "record": to(RECORD, '{"new": 1}\n'),
    "new record": to("bench/results/cluster/new.json", "{}\n"),
    "new picture": to("bench/results/cluster/new.png", "picture"),
    "no record": lambda root: (root / RECORD).unlink(),
    "what git ignores": to("runs/log", "text"),
}


@pytest.mark.parametrize("change", BY_BENCHMARKS)
def test_what_benchmarks_write_leaves_a_tree_clean(tree: Path, change: str) -> None:
    BY_BENCHMARKS[change](tree)
    assert changes(tree) == []
    assert record.commit().dirty is False


BY_OTHERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "words": ("README.md", to("README.md", PAGE.replace("Words", "Other words"))),
    "words and table": ("docs/benchmarks.md", to("docs/benchmarks.md", NEW_TABLES.replace("More", "Less"))),
    "no marker": ("README.md", to("README.md", PAGE.replace("<!-- bench:links -->\n<!-- /bench -->\n", ""))),
    "new marker": ("README.md", to("README.md", PAGE + "<!-- bench:weak -->\n<!-- /bench -->\n")),
    "other marker": ("README.md", to("README.md", PAGE.replace("bench:links", "bench:weak"))),
    "no page": ("README.md", lambda root: (root / "README.md").unlink()),
    "other page": ("docs/planning.md", to("docs/planning.md", "a page without such tables\n")),
    "source": ("bench/x.py", to("bench/x.py", "x = 2\n")),
    "no source": ("bench/x.py", lambda root: (root / "bench" / "x.py").unlink()),
    "new source": ("bench/new/y.py", to("bench/new/y.py", "y = 1\n")),
}


@pytest.mark.parametrize("change", BY_OTHERS)
def test_any_other_change_is_named(tree: Path, change: str) -> None:
    name, make = BY_OTHERS[change]
    make(tree)
    assert changes(tree) == [name]
    assert record.commit().dirty is True


def test_a_user_who_hides_new_files_from_himself_does_not_hide_them_here(tree: Path) -> None:
    git(tree, "config", "status.showUntrackedFiles", "no")
    write(tree / "new.py", "")
    assert changes(tree) == ["new.py"]


def test_a_change_that_is_committed_is_none(tree: Path) -> None:
    write(tree / "README.md", PAGE.replace("Words", "Other words"))
    write(tree / "new.py", "")
    git(tree, "add", "--all")
    assert changes(tree) == ["new.py", "README.md"]
    git(tree, "commit", "--quiet", "--message=more")
    assert changes(tree) == []


def test_where_git_cannot_tell_nothing_is_called_clean(tree: Path) -> None:
    (tree / ".git" / "index").write_bytes(b"broken")
    with pytest.raises(RuntimeError, match=r"commit: git status ended with 128 .*, expected 0"):
        record.commit()


def test_an_emptied_page_is_what_people_wrote() -> None:
    assert emptied(NEW_TABLES) == emptied(PAGE) == PAGE.replace("old\n", "")
