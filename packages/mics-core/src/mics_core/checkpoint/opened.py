"""A checkpoint's directory, held open, so that all that is read is of one save.

A save replaces and removes whole directories beside a load. What is opened by its path may be of another save than what
was verified by that path; what is opened inside a directory that was opened is of the same save, or is not there.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any
from weakref import finalize


class Opened:
    """A directory and the files in it that are held, all open as long as this lives."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open = ExitStack()
        self._directory = self._kept(os.open(path, os.O_RDONLY))
        self._held: dict[str, int] = {}
        finalize(self, self._open.close)

    def size(self, name: str) -> int | None:
        """A file's bytes; None if there is no such file."""
        try:
            with self._naming(name):
                found = os.stat(name, dir_fd=self._directory)
        except FileNotFoundError:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def hold(self, names: Iterable[str]) -> None:
        """Open files now, to be read later, whoever removes them meanwhile."""
        for name in names:
            if name not in self._held:
                self._held[name] = self._kept(self._opened(name, os.O_RDONLY))

    @contextmanager
    def stream(self, name: str) -> Iterator[IO[bytes]]:
        """A file from its beginning; several threads may read the same one."""
        with self._naming(name):
            if name in self._held:
                yield io.BufferedReader(_Reading(self._held[name]))
            else:
                with open(name, "rb", opener=self._opened) as file:
                    yield file

    def _opened(self, name: str, flags: int) -> int:
        try:
            with self._naming(name):
                return os.open(name, flags, dir_fd=self._directory)
        except FileNotFoundError as error:
            raise RuntimeError(
                f"load: {self._path / name} was there and is gone, expected no save that replaces or removes the "
                "checkpoint meanwhile: load again"
            ) from error

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Let errors of the disk say where the file is that they are about."""
        try:
            yield
        except OSError as error:
            error.filename = str(self._path / name)
            raise

    def _kept(self, number: int) -> int:
        self._open.callback(os.close, number)
        return number


class _Reading(io.RawIOBase):
    """A place in an open file, which others read, too."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, os.fstat(self._number).st_size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = os.preadv(self._number, [buffer], self._at)
        self._at += count
        return count
