"""A bar while something takes its time: rich's on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

BETWEEN_LINES = 5.0
"""Seconds."""


class Progress:
    """So many steps, on standard error. Without rich, or without a terminal, there are lines, and the first says so."""

    def __init__(self, steps: int, *, speaks: bool) -> None:
        self._steps = steps
        self._done = 0
        self._speaks = speaks
        self._said = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        """Begin."""
        if self._speaks and sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import Progress as Bar
            except ModuleNotFoundError:
                self._say("rich is not installed, so there are lines in place of a bar")
                return self
            self._bar = Bar(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=self._steps)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End."""
        if self._bar is not None:
            self._bar.stop()

    def advance(self, what: str) -> None:
        """A step is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=what)
        elif self._speaks and time.monotonic() - self._said > BETWEEN_LINES:
            self._said = time.monotonic()
            self._say(f"{self._done} of {self._steps}: {what}")

    def _say(self, text: str) -> None:
        print(f"probe: {text}", file=sys.stderr, flush=True)
