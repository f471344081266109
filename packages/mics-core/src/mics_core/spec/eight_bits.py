"""How part of a unit's buffer travels in eight bits: blocks with a scale each, and behind them what stays exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mics_core.spec.layout import BLOCK
from mics_core.spec.sharding import Precision

ALIGNED = 16
"""Bytes, at which each part of what travels begins in memory: kernels load in wide accesses there."""

Range = tuple[int, int]


@dataclass(frozen=True)
class EightBits:
    """A form for any range of a unit's buffer that begins and ends with a block."""

    values: torch.dtype  # of the elements in blocks
    rest: torch.dtype  # what the exact elements travel in
    exact: int  # where these begin in the unit

    def lengths(self, begin: int, end: int) -> tuple[int, int]:
        """Of a range: the elements in blocks, and those behind them."""
        blocked = min(max(self.exact - begin, 0), end - begin)
        return blocked, end - begin - blocked

    def sizes(self, begin: int, end: int) -> tuple[int, int, int]:
        """Bytes of a range's values, scales and rest."""
        blocked, rest = self.lengths(begin, end)
        return blocked * self.values.itemsize, blocked // BLOCK * torch.float32.itemsize, rest * self.rest.itemsize

    def nbytes(self, begin: int, end: int) -> int:
        """What travels of a range."""
        return sum(self.sizes(begin, end))

    def places(self, ranges: Sequence[Range]) -> tuple[list[list[Range]], int]:
        """Where the three parts of each range lie in one memory, and how many bytes that has."""
        places, end = [], 0
        for begin, last in ranges:
            parts = []
            for size in self.sizes(begin, last):
                parts.append((end, end + size))
                end = -(-(end + size) // ALIGNED) * ALIGNED
            places.append(parts)
        return places, end


@dataclass(frozen=True)
class Forms:
    """Of what travels between nodes of one unit; None where that stays as it is."""

    hop1: EightBits | None
    hop2: EightBits | None  # and sync
    refresh: EightBits | None

    @classmethod
    def of(cls, precision: Precision, exact: int) -> Forms:
        """As asked for, with exact elements from so many on."""

        def form(values: torch.dtype | None, rest: torch.dtype) -> EightBits | None:
            return None if values is None else EightBits(values, rest, exact)

        # A weight that is its own master has no other to differ from.
        differs = precision.compute != precision.master
        return cls(
            form(precision.hop1_between_nodes, precision.reduce),
            form(precision.between_nodes, precision.reduce),
            form(precision.between_nodes, precision.compute) if differs else None,
        )
