"""A range of a tensor's elements, counted in memory order, as boxes: what checkpoints describe and other tools read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Box:
    """A part of a tensor whose elements lie side by side in its memory."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    begin: int
    """The number of its first element in the whole tensor."""

    @property
    def end(self) -> int:
        """Behind its last element."""
        return self.begin + prod(self.sizes)


def boxes(shape: tuple[int, ...], begin: int, end: int, limit: int) -> Iterator[Box]:
    """Cut the elements [begin, end) of a tensor into boxes of at most `limit` elements, in order.

    Without a limit that matters, n dimensions need 2n - 1 boxes at most: a part of a row, whole rows, a part of a row.
    """
    if begin >= end:
        return
    if not shape:
        yield Box((), (), 0)
        return
    inner = prod(shape[1:])
    first, last = -(-begin // inner), end // inner  # whole rows
    if inner > limit or first > last:
        for row in range(begin // inner, -(-end // inner)):
            yield from _in_row(shape, row, begin, end, limit)
        return
    if begin < first * inner:
        yield from _in_row(shape, first - 1, begin, end, limit)
    together = limit // inner
    for row in range(first, last, together):
        rows = min(together, last - row)
        yield Box((row, *(0 for _ in shape[1:])), (rows, *shape[1:]), row * inner)
    if last * inner < end:
        yield from _in_row(shape, last, begin, end, limit)


def _in_row(shape: tuple[int, ...], row: int, begin: int, end: int, limit: int) -> Iterator[Box]:
    inner = prod(shape[1:])
    start = row * inner
    for box in boxes(shape[1:], max(begin - start, 0), min(end - start, inner), limit):
        yield Box((row, *box.offsets), (1, *box.sizes), start + box.begin)
