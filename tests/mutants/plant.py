"""Plant small faults in a copy of the packages, one by one, run the tests that should find them, and print a table.

    python tests/mutants/plant.py [WORDS ...] [--jobs 2] [--out table.md]

With words, only faults whose file or description holds one of them. Exit status 1 if a fault was missed that should
be found, 2 if an entry of faults.toml does not fit the code.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

from faults import ROOT, Fault, read

PATIENCE = 60.0  # seconds after which ranks count as hung: many faults make them wait for each other
LONGEST = 1200.0  # seconds of one run of tests
TOGETHER = ("-n", "2", "--dist", "loadfile")
PACKAGES = ("mics_kernels", "mics_core", "mics_models")


class CannotRun(Exception):
    """Tests that neither pass nor fail, because pytest cannot run them."""


@dataclass(frozen=True)
class Result:
    """What became of one fault."""

    fault: Fault
    found_by: str  # a test, or "" if all passed
    trouble: str = ""  # why the tests could not be run

    @property
    def is_right(self) -> bool:
        """Whether it was found, or is known to be missed."""
        return not self.trouble and bool(self.found_by) != bool(self.fault.missed)


class Copy:
    """A copy of the repository's files, for one fault at a time."""

    _times = count(1_000_000_000)  # Python takes a file of another time for changed, however soon after

    def __init__(self, folder: Path) -> None:
        self.root = folder
        git = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
            if (ROOT / name).is_file():  # the index keeps deleted files
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
        sources = [str(next(folder.glob(f"packages/*/src/{package}")).parent) for package in PACKAGES]
        self._environment = os.environ | {"PYTHONPATH": os.pathsep.join(sources)}
        self._check_that_it_is_imported()

    def try_out(self, fault: Fault) -> Result:
        """Plant the fault, run its tests, and take it out."""
        path = self.root / fault.file
        code = path.read_text()
        self._write(path, fault.planted(code))
        try:
            return Result(fault, self.failing(fault.tests))
        except CannotRun as trouble:
            return Result(fault, "", str(trouble))
        finally:
            self._write(path, code)

    def failing(self, tests: Sequence[str], *more: str) -> str:
        """The first of these tests that fails, if one does."""
        words = [
            *more,
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-rfE",
            "--no-header",
            "--tb=line",
            f"--patience={PATIENCE}",
        ]
        try:
            run = self._python("-m", "pytest", *words, *tests)
        except subprocess.TimeoutExpired:
            return f"{tests[0]} (hangs)"
        if run.returncode == 0:
            return ""
        if run.returncode < 0:  # a signal: kernels that read elsewhere end Triton's interpreter so
            return f"{tests[0]} (crashes)"
        named = re.search(r"^(?:FAILED|ERROR) (\S+\.py(?:::.+?)?)(?: - .*)?$", run.stdout, re.M)
        if run.returncode != 1 or named is None:
            raise CannotRun(f"{' '.join(tests)} could not be run:\n{run.stdout[-3000:]}{run.stderr[-3000:]}")
        return f"{named[1]} (by waiting)" if "not every rank was back" in run.stdout else named[1]

    def _python(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *words]
        return subprocess.run(
            command, cwd=self.root, env=self._environment, capture_output=True, text=True, check=False, timeout=LONGEST
        )

    def _write(self, path: Path, code: str) -> None:
        path.write_text(code)
        now = next(self._times)
        os.utime(path, (now, now))

    def _check_that_it_is_imported(self) -> None:
        program = (
            f"import {', '.join(PACKAGES)}; print({', '.join(f'{each}.__file__' for each in PACKAGES)}, sep='\\n')"
        )
        run = self._python("-c", program)
        places = run.stdout.split()
        if len(places) != len(PACKAGES) or not all(Path(place).is_relative_to(self.root) for place in places):
            raise RuntimeError(f"the tests import {places or run.stderr}, expected the copy in {self.root}")


def plant(faults: Sequence[Fault], jobs: int) -> list[Result]:
    """Try all of them, so many at once; what becomes of each is told as it is known."""
    told, lock, width = count(1), Lock(), len(str(len(faults)))
    with tempfile.TemporaryDirectory(prefix="mics-mutants-") as folder, ThreadPoolExecutor(jobs) as threads:
        copies: SimpleQueue[Copy] = SimpleQueue()
        for number in range(jobs):
            copies.put(Copy(Path(folder, str(number))))
        first = copies.get()
        if wrong := first.failing(sorted({t for fault in faults for t in fault.tests}), *TOGETHER):
            raise RuntimeError(f"{wrong} fails without any fault, expected all tests to pass: mend it first")
        copies.put(first)

        def attempt(fault: Fault) -> Result:
            copy = copies.get()
            try:
                result = copy.try_out(fault)
            finally:
                copies.put(copy)
            with lock:
                state = "found" if result.found_by else "missed, as known" if fault.missed else "MISSED"
                if result.trouble:
                    state = f"NOT RUN ({result.trouble})"
                print(f"{next(told):{width}}/{len(faults)} {state}: {fault.what}", file=sys.stderr, flush=True)
            return result

        return list(threads.map(attempt, faults))


def table(results: Sequence[Result]) -> str:
    """As Markdown."""
    lines = ["| file | fault | found by |", "| --- | --- | --- |"]
    for result in results:
        fault = result.fault
        found = result.found_by or f"**missed**: {fault.missed or 'a test is wanted'}"
        if result.trouble:
            found = "**not run**: see what was said above"
        name = fault.file.split("/src/")[-1]
        lines.append(f"| {name} | {fault.what} | {found.replace('|', '/')} |")
    found_count = sum(bool(result.found_by) for result in results)
    return "\n".join([*lines, "", f"{found_count} of {len(results)} faults were found."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the list, plant what was asked for, and print the table."""
    parser = argparse.ArgumentParser(prog="plant.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", help="only faults whose file or description holds one of these")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once; default 2")
    parser.add_argument("--out", type=Path, help="write the table there, too")
    options = parser.parse_args(arguments)
    faults = read()
    if troubles := [trouble for fault in faults if (trouble := fault.trouble())]:
        print("\n".join(troubles), file=sys.stderr)
        return 2
    chosen = [f for f in faults if not options.words or any(word in f.file or word in f.what for word in options.words)]
    if not chosen:
        parser.error(f"no fault has {' or '.join(options.words)} in its file or description")
    results = plant(chosen, options.jobs)
    text = table(results)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 0 if all(result.is_right for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
