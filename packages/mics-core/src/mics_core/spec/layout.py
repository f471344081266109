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

    @classmethod
    def plan(cls, shapes: Sequence[tuple[str, tuple[int, ...]]], pieces: int) -> Layout:
        """Lay parameters out one after another, in a buffer that can be cut into `pieces` equal ones."""
        slots, end = [], 0
        for name, shape in shapes:
            slots.append(Slot(name, tuple(shape), _up(end, ALIGNED)))
            end = slots[-1].end
        return cls(tuple(slots), _up(end, PIECE * pieces))

    def within(self, begin: int, end: int) -> tuple[tuple[int, int], ...]:
        """For each slot the part that lies in [begin, end), counted from `begin`; empty parts are (x, x)."""
        clipped = (
            (min(max(slot.begin, begin), end) - begin, min(max(slot.end, begin), end) - begin) for slot in self.slots
        )
        return tuple(clipped)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
