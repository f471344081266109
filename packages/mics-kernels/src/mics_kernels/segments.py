"""Pieces of a flat buffer, cut into blocks: which program of a launch works on which block of which piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from mics_kernels.backend import constexpr, jit, tl

BLOCK = 4096
"""Elements per program. With 4 warps 32 a thread: four to eight 128-bit loads in flight, under 64 registers."""

_BLOCK = constexpr(BLOCK)

FIELDS = 3
"""Every row of a segment table begins with offset, size and first program; an op may add columns behind them."""


PART = 1 << 18
"""Elements that a reference updates at a time, so that a cache still holds them for what it does next."""


class Run(NamedTuple):
    """What a reference updates at a time: segments that lie side by side, or a part of a large one."""

    begin: int
    sizes: list[int]
    segments: list[int]  # whose number each of the sizes is

    @property
    def end(self) -> int:
        """Where the next run may begin."""
        return self.begin + sum(self.sizes)


@dataclass(frozen=True, eq=False)
class Segments:
    """Disjoint pieces `[offset, offset + size)` of a flat buffer, in ascending order, with their launch table.

    Build it once with `Segments.build` and reuse it: building copies two small tables to the device.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    rows: torch.Tensor  # int64 [segments, FIELDS + extra], on the device
    owners: torch.Tensor  # int32 [programs], on the device: each program's segment

    @classmethod
    def build(
        cls,
        offsets: Sequence[int],
        sizes: Sequence[int],
        device: torch.device | str,
        extra: torch.Tensor | None = None,
    ) -> Segments:
        """Cut `[offset, offset + size)` for each pair into blocks; `extra` holds more columns for an op's rows."""
        if len(offsets) != len(sizes):
            raise ValueError(f"segments need one size per offset, got {len(offsets)} offsets and {len(sizes)} sizes")
        end = 0
        for number, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            if size < 0 or offset < end:
                raise ValueError(
                    f"segment {number} is [{offset}, {offset + size}), expected it to begin at or after {end}, "
                    f"where the one before it ends: pass segments in ascending order, without overlap"
                )
            end = offset + size
        size_column = torch.tensor(sizes, dtype=torch.int64, device="cpu")
        blocks = (size_column + BLOCK - 1) // BLOCK
        offset_column = torch.tensor(offsets, dtype=torch.int64, device="cpu")
        columns = torch.stack([offset_column, size_column, blocks.cumsum(0) - blocks], 1)
        rows = columns if extra is None else torch.cat([columns, extra], 1)
        owners = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32, device="cpu"), blocks)
        return cls(tuple(offsets), tuple(sizes), rows.to(device), owners.to(device))

    @property
    def programs(self) -> int:
        """How many blocks there are, one program each."""
        return self.owners.numel()

    @cached_property
    def runs(self) -> list[Run]:
        """All segments, cut into runs of at most PART elements: a CPU needs longer to begin than for a small one."""
        runs: list[Run] = []
        for number, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            for begin in range(offset, offset + size, PART):
                end = min(begin + PART, offset + size)
                if not runs or runs[-1].end < begin or end - runs[-1].begin > PART:
                    runs.append(Run(begin, [], []))
                runs[-1].sizes.append(end - begin)
                runs[-1].segments.append(number)
        return runs


@jit
def locate(rows: tl.tensor, owners: tl.tensor, WIDTH: tl.constexpr) -> tl.tuple:
    """This program's segment, its row, where the block begins in it, and how many elements the block has."""
    program = tl.program_id(0)
    segment = tl.load(owners + program).to(tl.int64)
    row = rows + segment * WIDTH
    start = (program - tl.load(row + 2)) * _BLOCK
    return segment, row, start, tl.minimum(tl.load(row + 1) - start, _BLOCK)
