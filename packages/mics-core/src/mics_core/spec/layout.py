"""How parameters lie in a unit's flat buffer, and what of them lies in a piece of it. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

ALIGNED = 16
"""Every parameter begins at a multiple of so many elements: 32 bytes of bf16, which kernels load in wide accesses."""

PIECE = 64
"""The smallest piece is a multiple of so many elements: NCCL copies by single elements where an address is not a
multiple of 16 bytes, and a cache line is 128."""

BLOCK = 256
"""So many elements have one scale where they travel in eight bits; pieces are whole blocks then."""


@dataclass(frozen=True)
class Slot:
    """The place of one parameter."""

    name: str
    shape: tuple[int, ...]
    begin: int

    @property
    def size(self) -> int:
        """The parameter's elements."""
        return prod(self.shape)

    @property
    def end(self) -> int:
        """Behind its last element."""
        return self.begin + self.size


@dataclass(frozen=True)
class Layout:
    """The slots of a unit, and the length of its flat buffer with all padding."""

    slots: tuple[Slot, ...]
    size: int
    exact: int
    """Where the elements begin that never travel in eight bits; the end, where that is not asked for."""

    @classmethod
    def plan(cls, shapes: Sequence[tuple[str, tuple[int, ...]]], pieces: int, exact: int | None = None) -> Layout:
        """Lay parameters out one after another, in a buffer that can be cut into `pieces` equal ones.

        With `exact`, those from this number on lie in blocks that hold none of the others.
        """
        slots, end, begin = [], 0, None
        for number, (name, shape) in enumerate(shapes):
            if number == exact:
                begin = end = _up(end, BLOCK)
            slots.append(Slot(name, tuple(shape), _up(end, ALIGNED)))
            end = slots[-1].end
        size = _up(end, (PIECE if exact is None else BLOCK) * pieces)
        return cls(tuple(slots), size, size if begin is None else begin)

    def within(self, begin: int, end: int) -> tuple[tuple[int, int], ...]:
        """For each slot the part that lies in [begin, end), counted from `begin`; empty parts are (x, x)."""
        clipped = (
            (min(max(slot.begin, begin), end) - begin, min(max(slot.end, begin), end) - begin) for slot in self.slots
        )
        return tuple(clipped)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
