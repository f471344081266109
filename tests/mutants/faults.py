"""The list of faults: small changes that lose data or give a wrong number, each with the tests that must see it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("faults.toml")


@dataclass(frozen=True)
class Fault:
    """A place in the code, the text there, and the text in its stead."""

    file: str  # from the root of the repository
    what: str  # goes wrong, in words
    text: str
    instead: str
    tests: tuple[str, ...]  # files or names of tests of `make test`
    missed: str = ""  # why no test sees it; "" where one must

    def trouble(self, root: Path = ROOT) -> str:
        """What is wrong with this entry as the code stands today; "" if nothing is."""
        path = root / self.file
        if not path.is_file():
            return f"{self.file} is not there: give the file that has the code now"
        found = path.read_text().count(self.text)
        if found != 1:
            return f"{self.file} has {self.text!r} {found} times, expected once: give the text that stands there now"
        if self.text == self.instead:
            return f"{self.file}: {self.what!r} changes nothing: give another text"
        absent = [test for test in self.tests if not (root / test.partition("::")[0]).exists()]
        if absent or not self.tests:
            return f"{self.file}: {self.what!r} names {absent or 'no tests'}, expected tests that are there"
        return ""

    def planted(self, code: str) -> str:
        """The code with the fault in it."""
        return code.replace(self.text, self.instead)


def read(path: Path = LIST) -> list[Fault]:
    """All faults, in their order."""
    entries = tomllib.loads(path.read_text())["fault"]
    return [Fault(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
