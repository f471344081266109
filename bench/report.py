"""Rebuild measured tables in README.md and docs/ from the records in bench/results, so that nobody types a figure.

    python -m bench.report                  # writes what has changed
    python -m bench.report --check          # changes nothing; 1 if something would change
    python -m bench.report --dirty cpu/host # takes this record, though the tree that it measured had changes; or `all`

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`; bench/tables.py lists the names. Of a record whose
commit does not say what was measured, because the tree had changes beside it, no table is made: the page keeps the one
that it has, and the status is 1.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from bench.pages import MARKED, PAGES
from bench.record import RESULTS, ROOT, load
from bench.tables import TABLES, Records

ALL = "all"
"""Stands for every record behind --dirty."""


def read(folder: Path = RESULTS) -> Records:
    """All records there."""
    return {str(path.relative_to(folder).with_suffix("")): load(path) for path in sorted(folder.glob("*/*.json"))}


def rebuilt(text: str, records: Records, refused: Collection[str] = ()) -> str:
    """The page with its tables renewed, but for those that show a refused record; ValueError for an unknown marker."""

    def renewed(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"report: marker bench:{name}, expected one of {', '.join(TABLES)}")
        shown = TABLES[name].of(records)
        return match.group() if shown.keys() & set(refused) else f"{begin}{TABLES[name].make(shown)}\n{end}"

    return MARKED.sub(renewed, text)


def refused(records: Records, taken: Collection[str] = ()) -> list[str]:
    """The records that tables show and whose tree had changes, but for those that the user takes all the same."""
    shown = {name for table in TABLES.values() for name in table.of(records)}
    spared = records.keys() if ALL in taken else set(taken)
    return sorted(name for name in shown - spared if records[name]["commit"]["dirty"])


def refusal(records: Records, names: Sequence[str]) -> str:
    """Why the pages do not show these records, and what to do."""
    told = ", ".join(f"{name} ({records[name]['command']})" for name in names)
    return (
        f"report: measured on a tree with changes, expected a clean commit: {told}; the tables that show such a record "
        "stay as they are until its command has run on a clean tree, or you take it all the same with "
        f"python -m bench.report --dirty NAME ... (or {ALL})"
    )


def renew(records: Records, refused: Collection[str] = (), *, write: bool = True) -> list[str]:
    """Write the pages that change; which those are, or would be if `write` is not set."""
    changed = []
    for page in PAGES:
        path = ROOT / page
        before = path.read_text("utf-8")
        after = rebuilt(before, records, refused)
        if after != before:
            changed.append(page)
            if write:
                path.write_text(after, "utf-8")
    return changed


def main(arguments: Sequence[str] | None = None) -> int:
    """Renew the pages."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say which pages are out of date")
    parser.add_argument(
        "--dirty",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"records to take though their tree had changes, such as cluster/weak-2, or {ALL}",
    )
    options = parser.parse_args(arguments)
    records = read()
    if unknown := set(options.dirty) - records.keys() - {ALL}:
        parser.error(f"--dirty got {', '.join(sorted(unknown))}, expected {ALL} or some of {', '.join(records)}")
    names = refused(records, options.dirty)
    changed = renew(records, names, write=not options.check)
    print(f"{'out of date' if options.check else 'renewed'}: {', '.join(changed) or 'nothing'}")
    if names:
        print(refusal(records, names), file=sys.stderr)
    return 1 if names or (options.check and changed) else 0


if __name__ == "__main__":
    sys.exit(main())
