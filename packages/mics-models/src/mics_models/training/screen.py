"""What the person at the terminal sees: the plan, a live bar, and a line for each report."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_LONGEST = timedelta.max // timedelta(seconds=1)  # a training may have 2 ** 63 steps


def fitted(words: Sequence[str], width: int) -> str:
    """Words with spaces in them in lines of at most this width, each word in one."""
    whole = "  ".join(word.replace(" ", "\N{NO-BREAK SPACE}") for word in words)
    lines = textwrap.wrap(whole, width, subsequent_indent="    ", break_long_words=False)
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


class Screen:
    """Rank 0's terminal; other ranks are silent. Without a terminal there are lines alone, and no bar."""

    def __init__(self, *, speaks: bool) -> None:
        self._console = Console(quiet=not speaks, highlight=False, soft_wrap=True, emoji=False)
        self._bar: Progress | None = None
        self._task: Any = None

    def say(self, text: str) -> None:
        """Text; what would move a terminal's cursor is shown as an unknown character."""
        self._console.print("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text), markup=False)

    def plan(self, title: str, rows: Mapping[str, str]) -> None:
        """The plan: a name and a text in each row."""
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, text in rows.items():
            table.add_row(name, text)
        self._console.print(table)

    def begin(self, first: int, steps: int) -> None:
        """Training begins, after `first` steps that were done before."""
        if self._console.is_terminal:
            columns = (
                TextColumn("loss {task.fields[loss]:.3f}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[speed]}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=steps, completed=first, loss=math.nan, speed="")
            self._bar.start()

    def stepped(self, done: int, loss: float) -> None:
        """So many steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, loss=loss)

    def report(self, row: Mapping[str, float], steps: int) -> None:
        """What the journal was told, as a line."""
        words = [f"step {row['step']:>{len(str(steps))}.0f}/{steps}", f"loss {row['loss']:.4f}"]
        if "held_out" in row:
            words.append(f"held out {row['held_out']:.4f}")
        speed = f"{row['tokens_per_second']:,.0f} tokens/s"
        words += [f"norm {row['norm']:.2f}", speed, f"exposed {row['exposed'] / row['step_seconds']:.0%}"]
        if "mfu" in row:
            words.append(f"MFU {row['mfu']:.1%}")
        seconds = round((steps - row["step"]) * row["step_seconds"])
        words.append(f"ETA {timedelta(seconds=min(seconds, _LONGEST))}")
        self.say(fitted(words, self._console.width) if self._console.is_terminal else "  ".join(words))
        if self._bar is not None:
            self._bar.update(self._task, speed=speed)

    def end(self) -> None:
        """Training is over."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
