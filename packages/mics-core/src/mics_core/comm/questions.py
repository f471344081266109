"""Questions that ranks ask each other, a few small numbers each, while the computation goes on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mics_core.comm.groups import silent
from mics_core.comm.lanes import Work

_KINDS, _TURNS = 1 << 16, 64  # of questions, and messages in a row of one


@dataclass
class Answers:
    """Small numbers on their way."""

    numbers: torch.Tensor
    work: Work

    def read(self) -> list[int]:
        """The numbers, once all ranks have given theirs."""
        self.work.wait()
        answers: list[int] = self.numbers.tolist()
        return answers


def find_largest(group: Any, ranks: Sequence[int], rank: int, numbers: torch.Tensor, what: str) -> None:
    """Overwrite numbers with the largest of all ranks'. 512 ranks need 9 rounds; gloo's ring, 1022 in a row.

    After round n each rank knows the largest of 2**n ranks before it, some twice at the end, which changes nothing.
    """
    heard = torch.zeros_like(numbers)
    # So that no question takes another one's answer; gloo aborts a process that gets more bytes than it waits for.
    kind = zlib.crc32(f"{what} {numbers.numel()}".encode()) % _KINDS * _TURNS
    for turn in range((len(ranks) - 1).bit_length()):
        distance = 1 << turn
        source, target = (rank - distance) % len(ranks), (rank + distance) % len(ranks)
        receiving = group.recv([heard], source, kind + turn)
        sending = group.send([numbers], target, kind + turn)
        for work, verb, other in (
            (receiving, "nothing came from", source),
            (sending, "nothing was taken by", target),
        ):
            try:
                work.wait()
            except RuntimeError as error:
                raise silent(verb, ranks[other], "", error) from error
        torch.maximum(numbers, heard, out=numbers)
