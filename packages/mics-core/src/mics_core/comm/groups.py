"""What travels between the ranks that meet on one level of a ladder.

A `Group` does three things, all blocking the lane they are called on: `all_gather` puts everyone's piece into one
buffer, `exchange` brings everyone's part of my piece, `swap` brings messages of any lengths. On GPUs the first two are
NCCL's all-gather and reduce-scatter. All else is messages between pairs: gloo's own reduce-scatter moves twice the
bytes, and its all-gather uses two thirds of a link between nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

# torch 2.13 renamed them, and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_TAGS = 1 << 31  # gloo's messages carry one of so many

Messages = Sequence[Sequence[torch.Tensor]]
"""Some for each rank of a group, or from each; my own are not looked at."""


def silent(verb: str, rank: int, place: str, error: BaseException) -> RuntimeError:
    """Of a rank that a message is missing from."""
    return RuntimeError(f"{verb} rank {rank}{place}: it does other work, has failed, or its link is down: {error}")


@dataclass(frozen=True)
class Membership:
    """Who is in a group, by their numbers in the whole job, and where I am among them."""

    ranks: tuple[int, ...]
    index: int
    name: str


class Group(Protocol):
    """The ranks that meet on one level of a ladder."""

    membership: Membership

    def all_gather(self, out: torch.Tensor, piece: torch.Tensor) -> None:
        """Put the ranks' pieces side by side into `out`; mine may already lie there."""

    def exchange(self, source: torch.Tensor) -> list[torch.Tensor]:
        """Cut `source` into one part for each rank; return what they sent for me, in their order or summed up."""

    def swap(self, leaving: Messages, arriving: Messages) -> None:
        """Send every other rank its messages, and receive those it has for me, which are as long as what is given."""


class HostGroup:
    """gloo. Receives are posted first, and every pair talks at once: that keeps both directions of a link busy.

    A message's tag is its length: gloo aborts a process that gets more bytes than it waits for, as where ranks do
    different things. So what does not fit is never taken, and its ranks hear of it at the timeout.
    """

    def __init__(self, membership: Membership, group: dist.ProcessGroup) -> None:
        self.membership = membership
        self._group = group
        size = len(membership.ranks)
        self._others = [(membership.index + turn) % size for turn in range(1, size)]
        self._received = torch.empty(0, dtype=torch.uint8, device="cpu")

    def all_gather(self, out: torch.Tensor, piece: torch.Tensor) -> None:
        """As of any group."""
        pieces = out.view(len(self.membership.ranks), -1)
        mine, tag = pieces[self.membership.index], piece.nbytes % _TAGS
        receives = [(other, self._group.recv([pieces[other]], other, tag)) for other in self._others]
        sends = [(other, self._group.send([piece], other, tag)) for other in self._others]
        if mine.data_ptr() != piece.data_ptr():
            mine.copy_(piece)
        self._wait(receives, sends)

    def exchange(self, source: torch.Tensor) -> list[torch.Tensor]:
        """As of any group."""
        parts = source.view(len(self.membership.ranks), -1)
        needed = parts[1:].numel() * source.itemsize
        if self._received.numel() < needed:
            self._received = torch.empty(needed, dtype=torch.uint8, device="cpu")
        rows = self.in_order(parts, self._received[:needed].view(source.dtype).view(-1, parts.shape[1]))
        self.swap([[part] for part in parts], [[row] for row in rows])
        return rows

    def swap(self, leaving: Messages, arriving: Messages) -> None:
        """As of any group. What goes to one rank goes in one message, which costs more than a copy of its bytes."""
        into = {other: _in_one(arriving[other]) for other in self._others}
        sent = {other: _in_one(leaving[other], filled=True) for other in self._others}
        receives = [
            (other, self._group.recv([message], other, message.nbytes % _TAGS)) for other, message in into.items()
        ]
        sends = [(other, self._group.send([message], other, message.nbytes % _TAGS)) for other, message in sent.items()]
        self._wait(receives, sends)
        for other, message in into.items():
            begin = 0
            for part in arriving[other] if len(arriving[other]) > 1 else ():
                part.copy_(message[begin : begin + part.numel()])
                begin += part.numel()

    def in_order(self, parts: torch.Tensor, arrived: torch.Tensor) -> list[torch.Tensor]:
        """What others send, in the order in which I talk to them, and my own part, in the order of the ranks."""
        arriving = dict(zip(self._others, arrived, strict=True))
        return [arriving.get(index, parts[self.membership.index]) for index in range(len(self.membership.ranks))]

    def _wait(self, receives: list[tuple[int, dist.Work]], sends: list[tuple[int, dist.Work]]) -> None:
        for verb, works in (("nothing came from", receives), ("nothing was taken by", sends)):
            for other, work in works:
                try:
                    work.wait()
                except RuntimeError as error:
                    raise silent(
                        verb, self.membership.ranks[other], f" on level {self.membership.name}", error
                    ) from error


def _in_one(messages: Sequence[torch.Tensor], *, filled: bool = False) -> torch.Tensor:
    """Memory for all of them, side by side."""
    if len(messages) == 1:
        return messages[0]
    return torch.cat(list(messages)) if filled else messages[0].new_empty(sum(part.numel() for part in messages))


class DeviceGroup:
    """NCCL, on the current stream."""

    def __init__(self, membership: Membership, group: dist.ProcessGroup) -> None:
        self.membership = membership
        self._group = group

    def all_gather(self, out: torch.Tensor, piece: torch.Tensor) -> None:
        """As of any group."""
        _all_gather(out, piece, group=self._group)

    def exchange(self, source: torch.Tensor) -> list[torch.Tensor]:
        """As of any group."""
        mine = source.view(len(self.membership.ranks), -1)[self.membership.index]
        _reduce_scatter(mine, source, group=self._group)  # NCCL takes the output inside the input
        return [mine]

    def swap(self, leaving: Messages, arriving: Messages) -> None:
        """As of any group."""
        operations = [
            dist.P2POp(verb, message, rank, self._group)
            for verb, messages in ((dist.irecv, arriving), (dist.isend, leaving))
            for index, rank in enumerate(self.membership.ranks)
            if index != self.membership.index
            for message in messages[index]
        ]
        for work in dist.batch_isend_irecv(operations):  # one launch; only the stream waits
            work.wait()
