"""What a recording consists of: steps in the queues of streams, and the blocks of memory that they use.

A block is an allocation: a storage that is resized to nothing and back has a new one each time. Operators keep their
arguments as places in blocks, so that a program can be done again on other memory (player.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

HOST = "the host"


class Act(Enum):
    OPERATOR = "operator"
    TAKE = "memory taken"
    FREE = "memory freed"
    RECORD = "event"
    WAIT = "wait"
    SEND = "collective"
    READ = "read by the host"


@dataclass(eq=False)
class Block:
    number: int
    size: int
    stream: str | None  # that took it; None: it was there before, or is the host's
    initial: Tensor | None = None  # bytes, of those that were there before
    freed: bool = False
    of_host: bool = False  # pinned or plain: reading it waits for no stream


@dataclass(frozen=True)
class Place:
    """A tensor in a block."""

    block: Block
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements

    @property
    def span(self) -> tuple[int, int]:
        if 0 in self.size:
            return 0, 0
        last = sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        begin = self.offset * self.dtype.itemsize
        return begin, begin + (last + 1) * self.dtype.itemsize


@dataclass(eq=False)
class Step:
    """One thing in a stream's queue."""

    number: int
    act: Act
    stream: str
    what: str = ""  # the operator, and the lines of code that asked for it
    job: str = ""  # of a lane
    reads: Sequence[Place] = ()
    writes: Sequence[Place] = ()
    block: Block | None = None  # taken or freed
    until: int = -1  # WAIT: the step that must be over
    group: tuple[str, str, int] | None = None  # SEND: the group's name and ranks, what it does, bytes
    function: Any = None
    leaves: Sequence[Any] = ()  # arguments, tensors as places
    spec: Any = None
    outs: Sequence[Place | None] = ()  # new memory that results go to
