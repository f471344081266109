"""What a checkpoint holds, as one rank sees it, and who writes what of it.

A `Cut` lies on all ranks in pieces. Where several ranks hold the same piece they share the writing of it: the rank that
has piece k of a unit at the highest rung, which is part of what it holds at every lower one, writes piece k. So each
element is written once, by a rank that has it, and every rank writes equally much of every unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from mics_core.checkpoint.boxes import Box, boxes

Copies = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]

LARGEST = 1 << 22
"""No more elements in one box. A reader that needs a part of a box reads the whole, so this bounds its memory, and what
ranks read in vain where the sharding is another one. A hundred billion parameters are 75,000 boxes."""


@dataclass(frozen=True)
class Name:
    """What something is called: the keys from the outermost dictionary inwards."""

    keys: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join(self.keys)


@dataclass(frozen=True)
class Cut:
    """A tensor of which this rank holds the elements from `first` on."""

    name: Name
    shape: tuple[int, ...]
    begin: int
    """Where it lies in its unit's flat buffer."""
    unit: int
    """How long that buffer is."""
    local: torch.Tensor
    first: int

    @property
    def size(self) -> int:
        """The elements of the whole tensor."""
        return prod(self.shape)

    def pieces(self, world: int) -> range:
        """The pieces of the unit in which a part of this lies, if `world` ranks have one each."""
        if not self.size:
            return range(1)  # somebody must write that there is nothing
        length = self.unit // world
        return range(self.begin // length, -(-(self.begin + self.size) // length))

    def part(self, piece: int, world: int) -> tuple[int, int]:
        """Which elements lie in a piece."""
        length = self.unit // world
        begin = min(max(piece * length - self.begin, 0), self.size)
        return begin, max(begin, min((piece + 1) * length - self.begin, self.size))

    def boxes(self, piece: int, world: int) -> list[Box]:
        """The part in a piece as boxes."""
        if not self.size:
            return [Box((0,) * len(self.shape), self.shape, 0)]
        return list(boxes(self.shape, *self.part(piece, world), LARGEST))

    def held(self) -> list[Box]:
        """What this rank holds, as boxes."""
        return list(boxes(self.shape, self.first, self.first + self.local.numel(), LARGEST))

    def values(self, box: Box) -> torch.Tensor:
        """The memory of a box of what this rank holds."""
        return self.local[box.begin - self.first : box.end - self.first].view(box.sizes)


@dataclass(frozen=True)
class Contents:
    """Everything that one rank knows of a checkpoint to be written."""

    cuts: tuple[Cut, ...]
    wholes: dict[Name, torch.Tensor]
    """Alike on all ranks; rank 0 writes them."""
    objects: dict[Name, bytes]
    """Rank 0's plain data, packed."""
    aliases: dict[str, Name]
    """Other names of tied weights, for the first one."""
    numbers: frozenset[str]
    """The optimizer's keys under which Python's numbers are, as tensors here."""
    own: bytes = b""
    """Every rank's own state, packed."""

    def staged(self, piece: int, world: int, copies: Copies) -> Contents:
        """The same with copies, in host memory, of what this rank is to write."""
        spans = [cut.part(piece, world) for cut in self.cuts]
        parts = [
            cut.local[begin - cut.first : end - cut.first] if end > begin else cut.local[:0]
            for cut, (begin, end) in zip(self.cuts, spans, strict=True)
        ]
        copied = iter(copies([*parts, *self.wholes.values()]))
        cuts = [replace(cut, local=next(copied), first=begin) for cut, (begin, _) in zip(self.cuts, spans, strict=True)]
        wholes = {name: next(copied) for name in self.wholes}
        return replace(self, cuts=tuple(cuts), wholes=wholes)

    def mine(self, piece: int, world: int) -> Iterator[tuple[Cut, Box]]:
        """What the rank with this piece writes of what is cut."""
        for cut in self.cuts:
            if piece in cut.pieces(world):
                for box in cut.boxes(piece, world):
                    yield cut, box


def own_name(rank: int) -> Name:
    """What a rank's own state is called."""
    return Name(("ranks", str(rank)))
