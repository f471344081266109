"""The ladder: how states move between degrees. Down is an all-gather, up a reduce-scatter, one step at a time.

    descend   O -> P after the optimizer, P -> 1 before computing
    climb     1 -> G after every micro-step (hop 1), G -> O once per optimizer step (hop 2)
    sync      O -> W and back: the same sum on all replicas, with as few bytes between nodes as can be

Both directions work in place: my piece at a degree is a range of my piece at any lower one.
"""

from __future__ import annotations

import torch

from mics_core.comm import World
from mics_core.ledger import Tally
from mics_core.topology import Rungs
from mics_kernels import accumulate


class Ladder:
    """The rungs of a sharding, with a process group for each step and direction that this rank takes part in."""

    def __init__(self, rungs: Rungs, world: World, tally: Tally) -> None:
        self.rungs = rungs
        self.rank = world.rank
        self._tally = tally
        self._names = [rungs.name(step) for step in range(len(rungs.degrees) - 1)]
        # A group for each direction: the next unit's parameters must not wait behind this unit's gradients.
        self._down, self._up = (
            [world.group(rungs.peers(self.rank, step), f"{name} {way}") for step, name in enumerate(self._names)]
            for way in ("down", "up")
        )

    def range(self, size: int, degree: int, within: int = 1) -> tuple[int, int]:
        """Where my piece of a flat buffer of `size` elements lies, counted from my piece at the degree `within`."""
        length = size // degree
        begin = self.rungs.piece(self.rank, degree) * length
        begin -= self.rungs.piece(self.rank, within) * (size // within)
        return begin, begin + length

    def descend(self, action: str, piece: torch.Tensor, whole: torch.Tensor, high: int, low: int) -> None:
        """Gather my piece at degree `low`, `whole`, from everyone's at degree `high`; `piece` may lie in it."""
        for step in reversed(self.rungs.steps(low, high)):
            begin, end = self.range(whole.numel() * low, self.rungs.degrees[step], within=low)
            self._count(action, step, piece)
            self._down[step].gather(whole[begin:end], piece)
            piece = whole[begin:end]

    def climb(self, action: str, buffer: torch.Tensor, low: int, high: int) -> list[torch.Tensor]:
        """Bring everyone's `buffer`, their pieces at degree `low`, up to `high`; return parts that add up to mine.

        The last addition is left to the caller, who knows where the sum is wanted. Overwrites `buffer`.
        """
        parts = [buffer]
        for step in self.rungs.steps(low, high):
            if len(parts) > 1:
                self._tally.reduced(buffer, parts)
                accumulate(buffer, parts, overwrite=True)
            group = self._up[step]
            parts = group.exchange(buffer)
            buffer = buffer.view(len(group.seat.ranks), -1)[group.seat.index]
            self._count(action, step, buffer)
        return parts

    def total(self, numbers: torch.Tensor, degree: int) -> torch.Tensor:
        """The sum of a few numbers over the ranks that hold one copy of a state, the same bits on all of them."""
        for step in self.rungs.steps(1, degree):
            group = self._up[step]
            everyone = numbers.new_empty((len(group.seat.ranks), numbers.numel()))
            group.gather(everyone.view(-1), numbers)
            numbers = everyone.sum(0)
        return numbers

    def compare(self, numbers: torch.Tensor, degree: int) -> torch.Tensor:
        """A few numbers of every rank that holds the same piece as I do, one row each, in the order of ranks."""
        rows = numbers.view(1, -1)
        for step in self.rungs.steps(degree, self.rungs.degrees[-1]):
            group = self._up[step]
            everyone = rows.new_empty((len(group.seat.ranks) * rows.shape[0], rows.shape[1]))
            group.gather(everyone.view(-1), rows.reshape(-1))
            rows = everyone
        return rows

    def _count(self, action: str, step: int, piece: torch.Tensor) -> None:
        self._tally.sent(action, self._names[step], (len(self._up[step].seat.ranks) - 1) * piece.nbytes)
