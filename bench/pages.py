"""The pages that show what was measured, and whether a tree has more changes than what benchmarks write themselves."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

PAGES = ("README.md", "docs/benchmarks.md", "docs/kernels.md")
MARKED = re.compile(r"(<!-- bench:(\S+) -->\n).*?(<!-- /bench -->)", re.S)
WRITTEN = "bench/results"
"""The folder of records and their pictures."""


def emptied(text: str) -> str:
    """A page without its tables: what people wrote."""
    return MARKED.sub(r"\1\3", text)


def changes(root: Path) -> list[str]:
    """Files that are not as in the commit of the tree at `root`, or that it does not have.

    What benchmarks write is no change: records, pictures, and tables between the markers of a page. RuntimeError where
    git does not say.
    """
    others = [f":!{name}" for name in (WRITTEN, *PAGES)]
    # A user's settings may hide new files.
    status = _git(root, "status", "--porcelain", "--untracked-files=all", "--", ".", *others)
    if status.returncode:
        raise RuntimeError(
            f"commit: git status ended with {status.returncode} ({status.stderr.strip()}), expected 0: without it no "
            "record can say whether the tree has changes"
        )
    return [line[3:] for line in status.stdout.splitlines()] + [page for page in PAGES if _rewritten(root, page)]


def _rewritten(root: Path, page: str) -> bool:
    """Whether more than its tables differs from the commit's."""
    committed, path = _git(root, "show", f"HEAD:./{page}"), root / page
    before = None if committed.returncode else emptied(committed.stdout)
    return before != (emptied(path.read_text("utf-8")) if path.exists() else None)


def _git(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # Without locks: others may work in the same tree.
    git = ["git", "-c", f"safe.directory={root}", "--no-optional-locks", *words]
    return subprocess.run(git, cwd=root, capture_output=True, text=True, encoding="utf-8", check=False)
