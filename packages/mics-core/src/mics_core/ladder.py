"""The ladder: how states move between degrees. Down is an all-gather, up a reduce-scatter, one step at a time.

    descend   O -> P after the optimizer, P -> 1 before computing
    climb     1 -> G after every micro-step (hop 1), G -> O once per optimizer step (hop 2)
    sync      O -> W and back: the same sum on all replicas, with as few bytes between nodes as can be

Both directions work in place: my piece at a degree is a range of my piece at any lower one.

A way that leaves the nodes has two stages on two lanes: while one unit is between nodes, another is inside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch

from mics_core.comm import World
from mics_core.first_cause import blamed
from mics_core.groups import Group
from mics_core.lanes import DONE, Lane, Ticket
from mics_core.ledger import Tally
from mics_core.sharding import Sharding
from mics_core.topology import Link, Rungs
from mics_core.transfer_order import TransferOrder
from mics_kernels import accumulate


class Route(Enum):
    """What goes side by side: each has a lane inside nodes and one between them, and groups that nothing else uses."""

    GATHER = "gather"
    HOP1 = "hop 1"
    RISE = "hop 2"
    FALL = "sync, refresh"


_CALLED = {(route, link): f"{route.value}, {link.value}" for route in Route for link in Link}
"""What lanes are called in messages."""

Finish = Callable[[list[torch.Tensor]], None]


@dataclass(frozen=True)
class Way:
    """Between two degrees, the lower one first; what it is for, in errors and in the ledger."""

    route: Route
    what: str
    action: str
    low: int
    high: int


class Ladder:
    """The rungs of a sharding, with lanes for each route and a process group for each of its steps on this rank."""

    def __init__(self, rungs: Rungs, sharding: Sharding, world: World, tally: Tally) -> None:
        self.rungs = rungs
        self.rank = world.rank
        self._tally = tally
        self.order = TransferOrder(world, sharding.params)
        self._names = [rungs.name(step) for step in rungs.steps(1, world.size)]
        self._params = sharding.params
        spans = {
            Route.GATHER: (1, sharding.params),
            Route.HOP1: (1, sharding.grads),
            Route.RISE: (sharding.grads, world.size),
            Route.FALL: (sharding.params, world.size),
        }
        self._lanes: dict[tuple[Route, Link], Lane] = {}
        self._groups: dict[tuple[Route, int], Group] = {}
        for route, span in spans.items():
            for step in rungs.steps(*span):
                link = rungs.link(step)
                name = self._track(route, link)
                self._lanes[route, link] = world.lane(
                    f"{name}, {link.value}", urgent=route in (Route.GATHER, Route.HOP1)
                )
                self._groups[route, step] = world.group(rungs.peers(self.rank, step), f"{self._names[step]}, {name}")

    def send(
        self, route: Route, link: Link, what: str, job: Callable[[], None], after: Sequence[Ticket] = ()
    ) -> Ticket:
        """Do a job that uses a route's groups, after all before it on its lane; its errors tell what it was."""

        def named() -> None:
            try:
                job()
            except RuntimeError as error:
                raise blamed(what, error) from error

        self.order.note(_CALLED[route, link], what, gather=route is Route.GATHER)
        return self._lanes[route, link].submit(named, after)

    def send_up(self, way: Way, buffer: torch.Tensor, finish: Finish, after: Sequence[Ticket] = ()) -> Ticket:
        """Hand a climb to its lanes; `finish` gets the parts that add up to mine, on the last of them."""
        *stages, (low, high) = self.rungs.stages(way.low, way.high)
        for below, above in stages:
            begin, end = self.range(buffer.numel() * below, above, within=below)
            mine = buffer[begin:end]
            job = partial(self._climb_and_add, way, buffer, mine, below, above)
            after = [self.send(way.route, self.link_above(below), way.what, job, after)]
            buffer = mine

        def last() -> None:
            finish(self.climb(way.route, way.action, buffer, low, high))

        return self.send(way.route, self.link_above(low), way.what, last, after)

    def send_down(self, way: Way, piece: torch.Tensor, whole: torch.Tensor, after: Sequence[Ticket] = ()) -> Ticket:
        """Hand a descent to its lanes: `whole`, my piece at the lower degree, from everyone's at the higher one."""
        ticket: Ticket = DONE
        for low, high in reversed(self.rungs.stages(way.low, way.high)):
            begin, end = self.range(whole.numel() * way.low, low, within=way.low)
            job = partial(self.descend, way.route, way.action, piece, whole[begin:end], high, low)
            ticket = self.send(way.route, self.link_above(low), way.what, job, after)
            piece, after = whole[begin:end], [ticket]
        return ticket

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
        if degree > self._params:
            above = Way(Route.FALL, "full_params", "full", self._params, degree)
            self.send_down(above, piece, whole[begin:end]).wait()
        if self._params > 1:
            self.send_down(Way(Route.GATHER, "full_params", "full", 1, self._params), whole[begin:end], whole).wait()

    def climb(self, route: Route, action: str, buffer: torch.Tensor, low: int, high: int) -> list[torch.Tensor]:
        """Bring everyone's `buffer`, their pieces at degree `low`, up to `high`; return parts that add up to mine.

        The last addition is left to the caller, who knows where the sum is wanted. Overwrites `buffer`.
        """
        parts = [buffer]
        for step in self.rungs.steps(low, high):
            self._add(buffer, parts)
            group = self._groups[route, step]
            parts = group.exchange(buffer)
            buffer = buffer.view(len(group.seat.ranks), -1)[group.seat.index]
            self._count(action, step, buffer)
        return parts

    def total(self, numbers: torch.Tensor, degree: int) -> torch.Tensor:
        """The sum of a few numbers over the ranks that hold one copy of a state, the same bits on all of them."""
        for step in self.rungs.steps(1, degree):
            numbers = self._everyone(step, numbers.view(1, -1), "norm of all gradients").sum(0)
        return numbers

    def compare(self, numbers: torch.Tensor, degree: int) -> torch.Tensor:
        """A few numbers of every rank that holds the same piece as I do, one row each, in the order of ranks."""
        rows = numbers.view(1, -1)
        for step in self.rungs.steps(degree, self.rungs.degrees[-1]):
            rows = self._everyone(step, rows, "comparison of replicas")
        return rows

    def _everyone(self, step: int, rows: torch.Tensor, what: str) -> torch.Tensor:
        route = Route.GATHER if self.rungs.degrees[step] < self._params else Route.FALL
        group = self._groups[route, step]
        gathered = rows.new_empty((len(group.seat.ranks) * rows.shape[0], rows.shape[1]))
        job = partial(group.gather, gathered.view(-1), rows.reshape(-1))
        ticket = self.send(route, self.rungs.link(step), what, job)
        self.wait(ticket)
        return gathered

    def _climb_and_add(self, way: Way, buffer: torch.Tensor, mine: torch.Tensor, low: int, high: int) -> None:
        self._add(mine, self.climb(way.route, way.action, buffer, low, high))

    def _add(self, mine: torch.Tensor, parts: list[torch.Tensor]) -> None:
        if len(parts) > 1:
            self._tally.reduced(mine, parts)
            accumulate(mine, parts, overwrite=True)

    def link_above(self, degree: int) -> Link:
        """What the step from this degree upwards crosses."""
        return self.rungs.link(self.rungs.degrees.index(degree))

    def _track(self, route: Route, link: Link) -> str:
        """At the top what rises and what falls takes turns: a group costs sockets or GPU memory."""
        top = link is self.rungs.link(len(self._names) - 1)
        return "slow" if top and route in (Route.RISE, Route.FALL) else route.value

    def _count(self, action: str, step: int, piece: torch.Tensor) -> None:
        self._tally.sent(
            action, self._names[step], (self.rungs.degrees[step + 1] // self.rungs.degrees[step] - 1) * piece.nbytes
        )
