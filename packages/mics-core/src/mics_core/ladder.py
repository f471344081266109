"""The ladder: how states move between degrees. Down is an all-gather, up a reduce-scatter, one step at a time.

    descend   O -> P after the optimizer, P -> 1 before computing
    climb     1 -> G after every micro-step (hop 1), G -> O once per optimizer step (hop 2)
    sync      O -> W and back: the same sum on all replicas, with as few bytes between nodes as can be

Both directions work in place: my piece at a degree is a range of my piece at any lower one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial

import torch

from mics_core.comm import World
from mics_core.lanes import Ticket
from mics_core.ledger import Tally
from mics_core.sharding import Sharding
from mics_core.topology import Rungs
from mics_kernels import accumulate


class Route(Enum):
    """What goes side by side: each route has a lane, and groups that nothing else uses."""

    GATHER = "gather"
    HOP1 = "hop 1"
    SLOW = "slow"  # refresh, hop 2, sync: what goes above P


class Ladder:
    """The rungs of a sharding, with a lane for each route and a process group for each of its steps on this rank."""

    def __init__(self, rungs: Rungs, sharding: Sharding, world: World, tally: Tally) -> None:
        self.rungs = rungs
        self.rank = world.rank
        self._tally = tally
        self._names = [rungs.name(step) for step in rungs.steps(1, world.size)]
        self._params = sharding.params
        self._lanes = {route: world.lane(route.value, urgent=route is Route.GATHER) for route in Route}
        spans = {
            Route.GATHER: (1, sharding.params),
            Route.HOP1: (1, sharding.grads),
            Route.SLOW: (sharding.params, world.size),
        }
        self._groups = {
            (route, step): world.group(rungs.peers(self.rank, step), f"{self._names[step]}, {route.value}")
            for route, span in spans.items()
            for step in rungs.steps(*span)
        }

    def send(self, route: Route, what: str, job: Callable[[], None], after: Sequence[Ticket] = ()) -> Ticket:
        """Do a job that uses a route's groups, after all before it on this route; its errors tell what it was."""

        def named() -> None:
            try:
                job()
            except RuntimeError as error:
                raise RuntimeError(f"{what} failed on rank {self.rank}: {error}") from error

        return self._lanes[route].submit(named, after)

    def wait(self, ticket: Ticket) -> None:
        """Let the computation wait, and count how long it stands still."""
        self._tally.standstill.wait(ticket)

    def range(self, size: int, degree: int, within: int = 1) -> tuple[int, int]:
        """Where my piece of a flat buffer of `size` elements lies, counted from my piece at the degree `within`."""
        length = size // degree
        begin = self.rungs.piece(self.rank, degree) * length
        begin -= self.rungs.piece(self.rank, within) * (size // within)
        return begin, begin + length

    def descend(self, route: Route, action: str, piece: torch.Tensor, whole: torch.Tensor, high: int, low: int) -> None:
        """Gather my piece at degree `low`, `whole`, from everyone's at degree `high`; `piece` may lie in it."""
        for step in reversed(self.rungs.steps(low, high)):
            begin, end = self.range(whole.numel() * low, self.rungs.degrees[step], within=low)
            self._count(action, step, piece)
            self._groups[route, step].gather(whole[begin:end], piece)
            piece = whole[begin:end]

    def assemble(self, piece: torch.Tensor, whole: torch.Tensor, degree: int) -> None:
        """Gather a whole state of a degree not below P, and wait for it. Rare, so it has no groups of its own."""
        begin, end = self.range(whole.numel(), degree)
        whole[begin:end] = piece
        begin, end = self.range(whole.numel(), self._params)
        for route, source, target, high, low in (
            (Route.SLOW, piece, whole[begin:end], degree, self._params),
            (Route.GATHER, whole[begin:end], whole, self._params, 1),
        ):
            job = partial(self.descend, route, "full", source, target, high, low)
            self.send(route, "full_params", job).wait()

    def climb(self, route: Route, action: str, buffer: torch.Tensor, low: int, high: int) -> list[torch.Tensor]:
        """Bring everyone's `buffer`, their pieces at degree `low`, up to `high`; return parts that add up to mine.

        The last addition is left to the caller, who knows where the sum is wanted. Overwrites `buffer`.
        """
        parts = [buffer]
        for step in self.rungs.steps(low, high):
            if len(parts) > 1:
                self._tally.reduced(buffer, parts)
                accumulate(buffer, parts, overwrite=True)
            group = self._groups[route, step]
            parts = group.exchange(buffer)
            buffer = buffer.view(len(group.seat.ranks), -1)[group.seat.index]
            self._count(action, step, buffer)
        return parts

    def total(self, numbers: torch.Tensor, degree: int) -> torch.Tensor:
        """The sum of a few numbers over the ranks that hold one copy of a state, the same bits on all of them."""
        for step in self.rungs.steps(1, degree):
            numbers = self._everyone(step, numbers.view(1, -1)).sum(0)
        return numbers

    def compare(self, numbers: torch.Tensor, degree: int) -> torch.Tensor:
        """A few numbers of every rank that holds the same piece as I do, one row each, in the order of ranks."""
        rows = numbers.view(1, -1)
        for step in self.rungs.steps(degree, self.rungs.degrees[-1]):
            rows = self._everyone(step, rows)
        return rows

    def _everyone(self, step: int, rows: torch.Tensor) -> torch.Tensor:
        route = Route.GATHER if self.rungs.degrees[step] < self._params else Route.SLOW
        group = self._groups[route, step]
        gathered = rows.new_empty((len(group.seat.ranks) * rows.shape[0], rows.shape[1]))
        ticket = self.send(route, "comparing", lambda: group.gather(gathered.view(-1), rows.reshape(-1)))
        self.wait(ticket)
        return gathered

    def _count(self, action: str, step: int, piece: torch.Tensor) -> None:
        self._tally.sent(
            action, self._names[step], (self.rungs.degrees[step + 1] // self.rungs.degrees[step] - 1) * piece.nbytes
        )
