"""Tables and numbers as the planner's commands print them: no line wider than asked, no exponent, a unit that suits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import fill

from mics_core.spec.sharding import Sharding

WIDTH = 80
"""Columns of a terminal whose width is unknown."""


def aligned(rows: Sequence[Sequence[str]], left: Iterable[int] = ()) -> str:
    """Numbers end in one line, and the columns `left` begin in one."""
    flush = set(left)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(widths[column]) if column in flush else cell.rjust(widths[column])
            for column, cell in enumerate(row)
        ).rstrip()
        for row in rows
    )


def hanging(rows: Sequence[tuple[str, str]], width: int) -> str:
    """Names, and beside each a sentence that goes on in further lines of its own."""
    first = max(len(name) for name, _ in rows) + 2
    return "\n".join(
        fill(said, width, initial_indent=name.ljust(first), subsequent_indent=" " * first, break_long_words=False)
        for name, said in rows
    )


def degrees(sharding: Sharding) -> str:
    """P, G, O."""
    return f"{sharding.params}, {sharding.grads}, {sharding.optimizer}"


def digits(number: float) -> str:
    """Three of them; all of those before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def gigabytes(count: int) -> str:
    """Of so many bytes, without the unit."""
    return f"{count / 1e9:,.1f}" if count >= 1e10 else f"{count / 1e9:.2f}"


def unit_of(seconds: Iterable[float]) -> tuple[str, float]:
    """A unit in which all of these can be read, and how many of it a second has."""
    return ("ms", 1e3) if min(seconds) < 0.1 else ("s", 1.0)


def duration(seconds: float) -> str:
    """With its unit."""
    if seconds <= 0:
        return "0 s"
    name, many = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
    return f"{digits(many * seconds)} {name}"
