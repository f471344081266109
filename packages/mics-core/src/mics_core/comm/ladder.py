"""The ladder: how states move between degrees. Down is an all-gather, up a reduce-scatter, level by level.

With 2 ranks a node, 8 ranks and Sharding(2, 2, 8) the rungs are 1, 2 and 8:

    degree 8   master, optimizer state      ^ hop 2: once a step      | refresh: once a step
    --------   level 2-8, between nodes     |                         v
    degree 2   shard, sum of gradients      ^ hop 1: each micro-step  | gather: each use of a unit
    --------   level 1-2, inside nodes      |                         v
    degree 1   gradients of a backward, whole parameters

Both directions work in place: my piece at a degree is a range of my piece at any lower one. Above O all ranks need the
same sum: it goes up to the top, where each rank adds up a piece, and down again (sync).

Between nodes a transfer may travel in eight bits (parcel.py). Gradients are rounded by whoever sends them, and summed
where they arrive. A gather is rounded by the owner alone, who takes the rounded one, too: all hold the same bits.

A way with levels inside and between nodes has two legs, one lane each: while one unit is between nodes, another is
inside them. On the top level's side of the border of a node hop 2 and refresh share one lane, `slow`: a group costs
sockets or GPU memory, and a refresh begins after hop 2 has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch

from mics_core.comm.counters import Counters
from mics_core.comm.groups import Group, Membership, Messages
from mics_core.comm.lanes import DONE, Lane, Work
from mics_core.comm.parcel import Addends, Parcel, Room, add_up
from mics_core.comm.transfer_order import TransferOrder
from mics_core.comm.world import World
from mics_core.spec.eight_bits import EightBits
from mics_core.spec.sharding import Sharding
from mics_core.spec.topology import Rungs, Scope


class Route(Enum):
    """A kind of transfer. Each has a lane inside nodes and one between them, so that one does not wait for another."""

    GATHER = "gather"
    HOP1 = "hop 1"
    HOP2 = "hop 2"
    REFRESH = "sync, refresh"


Addition = Callable[[Addends], None]


def lane_name(rungs: Rungs, route: Route, scope: Scope) -> str:
    """What the lane of a route and its groups are called, apart from the scope."""
    top = scope is rungs.scope(len(rungs.degrees) - 2)
    return "slow" if top and route in (Route.HOP2, Route.REFRESH) else route.value


@dataclass(frozen=True)
class Transfer:
    """A way between two degrees, the lower one first; errors call it `what`, and the ledger counts it as `action`."""

    route: Route
    what: str
    action: str
    low: int
    high: int
    form: EightBits | None = None  # in which it travels between nodes; None: as it is


@dataclass(frozen=True)
class Coding:
    """What an all-gather in eight bits does at its ends."""

    fill: Callable[[Parcel], None]  # from my piece
    take: Callable[[torch.Tensor, Parcel], None]  # what came, into the part of `out` that it is for


class Ladder:
    """The rungs of a sharding, with lanes for each route and a process group for each of its levels on this rank."""

    def __init__(self, rungs: Rungs, sharding: Sharding, world: World, counters: Counters) -> None:
        self.rungs = rungs
        self.rank = world.rank
        self.order = TransferOrder(world, sharding.params)
        self._counters = counters
        self._params = sharding.params
        self._names = [rungs.name(level) for level in rungs.levels(1, world.size)]
        self._lanes: dict[tuple[Route, Scope], tuple[str, Lane]] = {}
        self._groups: dict[tuple[Route, int], Group] = {}
        self.rooms: dict[str, Room] = {}  # by lane
        spans = {
            Route.GATHER: (1, sharding.params),
            Route.HOP1: (1, sharding.grads),
            Route.HOP2: (sharding.grads, world.size),
            Route.REFRESH: (sharding.params, world.size),
        }
        for route, span in spans.items():
            for level in rungs.levels(*span):
                scope = rungs.scope(level)
                name = lane_name(rungs, route, scope)
                lane = f"{name}, {scope.value}"
                # A late gather stops the computation, and a late hop 1 the ring of buffers; the others have time.
                urgent = route in (Route.GATHER, Route.HOP1)
                self._lanes[route, scope] = lane, world.lane(lane, urgent=urgent)
                self.rooms[lane] = Room(world.device)
                self._groups[route, level] = world.group(
                    rungs.members(self.rank, level), f"{self._names[level]}, {name}"
                )

    # ---- jobs for lanes

    def submit(
        self, route: Route, scope: Scope, what: str, job: Callable[[], None], after: Sequence[Work] = ()
    ) -> Work:
        """Do a job that uses a route's groups, after all before it on its lane; its errors tell what it was."""
        name, lane = self._lanes[route, scope]
        self.order.note(name, what, gather=route is Route.GATHER)
        return lane.submit(what, job, after)

    def reduce_scatter_async(
        self, transfer: Transfer, buffer: torch.Tensor, add: Addition, after: Sequence[Work] = ()
    ) -> Work:
        """Hand a reduce-scatter to its lanes; `add` gets the addends of my piece, on the last of them.

        Overwrites `buffer`, which must stay as it is until the work is over.
        """
        *legs, (low, high) = self.rungs.legs(transfer.low, transfer.high)
        for below, above in legs:
            begin, end = self.range(buffer.numel() * below, above, within=below)
            mine = buffer[begin:end]
            job = partial(self._reduce_scatter_into, transfer, buffer, mine, below, above)
            after = [self.submit(transfer.route, self.scope_above(below), transfer.what, job, after)]
            buffer = mine

        def last() -> None:
            add(self.reduce_scatter(transfer, buffer, low, high))

        return self.submit(transfer.route, self.scope_above(low), transfer.what, last, after)

    def all_gather_async(
        self,
        transfer: Transfer,
        piece: torch.Tensor,
        out: torch.Tensor,
        after: Sequence[Work] = (),
        coding: Coding | None = None,
    ) -> Work:
        """Hand an all-gather to its lanes: `out`, my piece at the lower degree, from everyone's at the higher one."""
        work: Work = DONE
        for low, high in reversed(self.rungs.legs(transfer.low, transfer.high)):
            begin, end = self.range(out.numel() * transfer.low, low, within=transfer.low)
            if coding is not None and self.in_eight_bits(transfer, low):
                job = partial(self._all_gather_coded, transfer, coding, out[begin:end], low, high)
            else:
                job = partial(self.all_gather, transfer, piece, out[begin:end], low, high)
            work = self.submit(transfer.route, self.scope_above(low), transfer.what, job, after)
            piece, after = out[begin:end], [work]
        return work

    def all_gather_full(self, piece: torch.Tensor, whole: torch.Tensor, degree: int) -> None:
        """Gather a whole state of a degree not below P, and wait for it. Rare, so it has no groups of its own."""
        begin, end = self.range(whole.numel(), degree)
        whole[begin:end] = piece
        begin, end = self.range(whole.numel(), self._params)
        if degree > self._params:
            above = Transfer(Route.REFRESH, "full_params", "full", self._params, degree)
            self.all_gather_async(above, piece, whole[begin:end]).wait()
        if self._params > 1:
            below = Transfer(Route.GATHER, "full_params", "full", 1, self._params)
            self.all_gather_async(below, whole[begin:end], whole).wait()

    def wait(self, work: Work) -> None:
        """Let the computation wait, and count how long it stands still."""
        self._counters.exposed.wait(work)

    # ---- on a lane

    def all_gather(self, transfer: Transfer, piece: torch.Tensor, out: torch.Tensor, low: int, high: int) -> None:
        """Gather my piece at `low`, `out`, from everyone's at `high`; `piece`, mine there, may lie in `out`."""
        for level in reversed(self.rungs.levels(low, high)):
            begin, end = self.range(out.numel() * low, self.rungs.degrees[level], within=low)
            self._count(transfer, level, self._peers(level) * piece.nbytes)
            # The pieces of a level's ranks lie side by side in the order of the ranks, so nothing is rearranged.
            self._groups[transfer.route, level].all_gather(out[begin:end], piece)
            piece = out[begin:end]

    def _all_gather_coded(self, transfer: Transfer, coding: Coding, out: torch.Tensor, low: int, high: int) -> None:
        room, size = self._room(transfer, low), out.numel() * low
        key = (transfer.form, size, low, high)
        whole, mine, swaps = room.once(key, partial(self._gather_plan, room, transfer, size, low, high))
        coding.fill(mine)
        self._counters.moved("quantize", mine.nbytes + (mine.end - mine.begin) * 2 * out.itemsize)
        for level, sent, leaving, arriving in swaps:
            self._count(transfer, level, sent)
            self._groups[transfer.route, level].swap(leaving, arriving)
        self._counters.added(out, [whole], overwrite=False)
        coding.take(out, whole)

    def _gather_plan(
        self, room: Room, transfer: Transfer, size: int, low: int, high: int
    ) -> tuple[Parcel, Parcel, list[tuple[int, int, Messages, Messages]]]:
        """All of it, my part of it, and for each level what is sent, in bytes, and what leaves and arrives."""
        assert transfer.form is not None
        (whole,) = room.parcels(transfer.form, [self.range(size, low)])
        swaps: list[tuple[int, int, Messages, Messages]] = []
        for level in reversed(self.rungs.levels(low, high)):
            membership = self._groups[transfer.route, level].membership
            parts = _cut(whole.part(*self.range(size, self.rungs.degrees[level])), len(membership.ranks))
            mine = parts[membership.index]
            leaving = [mine.tensors()] * len(parts)
            swaps.append((level, self._peers(level) * mine.nbytes, leaving, [part.tensors() for part in parts]))
        return whole, whole.part(*self.range(size, high)), swaps

    def reduce_scatter(self, transfer: Transfer, buffer: torch.Tensor, low: int, high: int) -> Addends:
        """Bring everyone's `buffer`, their pieces at degree `low`, up to `high`; return the addends of mine.

        The last addition is left to the caller, who knows where the sum is wanted. Overwrites `buffer`.
        """
        addends: Addends = [buffer]
        for level in self.rungs.levels(low, high):
            self._add(buffer, addends)
            group, below = self._groups[transfer.route, level], self.rungs.degrees[level]
            mine = buffer.view(len(group.membership.ranks), -1)[group.membership.index]
            if self.in_eight_bits(transfer, below):
                addends = self._exchange_coded(transfer, group, buffer, level)
            else:
                addends = group.exchange(buffer)
                self._count(transfer, level, self._peers(level) * mine.nbytes)
            buffer = mine
        return addends

    def _exchange_coded(self, transfer: Transfer, group: Group, buffer: torch.Tensor, level: int) -> list[Parcel]:
        degree = self.rungs.degrees[level]
        room, size = self._room(transfer, degree), buffer.numel() * degree
        key = (transfer.form, size, level)
        plan = partial(self._exchange_plan, room, transfer, group.membership, size, level)
        whole, addends, sent, leaving, arriving = room.once(key, plan)
        whole.fill(buffer)
        self._counters.moved("quantize", buffer.nbytes + whole.nbytes)
        self._count(transfer, level, sent)
        group.swap(leaving, arriving)
        return addends

    def _exchange_plan(
        self, room: Room, transfer: Transfer, membership: Membership, size: int, level: int
    ) -> tuple[Parcel, list[Parcel], int, Messages, Messages]:
        """What leaves, the addends of my piece by rank, what is sent, in bytes; messages that leave and arrive."""
        assert transfer.form is not None
        below, above = self.rungs.degrees[level : level + 2]
        ranges = [self.range(size, below), *[self.range(size, above)] * self._peers(level)]
        whole, *arriving = room.parcels(transfer.form, ranges)
        parts, index = _cut(whole, len(membership.ranks)), membership.index
        addends = [*arriving[:index], parts[index], *arriving[index:]]
        leaving = [part.tensors() for part in parts]
        return whole, addends, whole.nbytes - parts[index].nbytes, leaving, [each.tensors() for each in addends]

    def _reduce_scatter_into(
        self, transfer: Transfer, buffer: torch.Tensor, mine: torch.Tensor, low: int, high: int
    ) -> None:
        self._add(mine, self.reduce_scatter(transfer, buffer, low, high))

    def _add(self, mine: torch.Tensor, addends: Addends) -> None:
        if len(addends) > 1:
            self._counters.reduced(mine, addends)
            add_up(mine, addends, overwrite=True)

    def _count(self, transfer: Transfer, level: int, sent: int) -> None:
        self._counters.sent(transfer.action, self._names[level], sent)

    def _peers(self, level: int) -> int:
        return self.rungs.degrees[level + 1] // self.rungs.degrees[level] - 1

    def _room(self, transfer: Transfer, degree: int) -> Room:
        return self.rooms[self._lanes[transfer.route, self.scope_above(degree)][0]]

    # ---- a few numbers

    def total(self, numbers: torch.Tensor, degree: int) -> torch.Tensor:
        """The sum of a few numbers over the ranks that hold one copy of a state, the same bits on all of them."""
        for level in self.rungs.levels(1, degree):
            numbers = self._everyone(level, numbers.view(1, -1), "norm of all gradients").sum(0)
        return numbers

    def compare(self, numbers: torch.Tensor, degree: int) -> torch.Tensor:
        """A few numbers of every rank that holds the same piece as I do, one row each, in the order of ranks."""
        rows = numbers.view(1, -1)
        for level in self.rungs.levels(degree, self.rungs.degrees[-1]):
            rows = self._everyone(level, rows, "comparison of replicas")
        return rows

    def _everyone(self, level: int, rows: torch.Tensor, what: str) -> torch.Tensor:
        # Any group of the level does: nothing else is under way.
        route = Route.GATHER if self.rungs.degrees[level] < self._params else Route.REFRESH
        group = self._groups[route, level]
        gathered = rows.new_empty((len(group.membership.ranks) * rows.shape[0], rows.shape[1]))
        job = partial(group.all_gather, gathered.view(-1), rows.reshape(-1))
        self.wait(self.submit(route, self.rungs.scope(level), what, job))
        return gathered

    # ---- where things are

    def range(self, size: int, degree: int, within: int = 1) -> tuple[int, int]:
        """Where my piece of a flat buffer of `size` elements lies, counted from my piece at the degree `within`."""
        length = size // degree
        begin = self.rungs.piece_number(self.rank, degree) * length
        begin -= self.rungs.piece_number(self.rank, within) * (size // within)
        return begin, begin + length

    def scope_above(self, degree: int) -> Scope:
        """What the level from this degree upwards crosses."""
        return self.rungs.scope(self.rungs.degrees.index(degree))

    def crosses_nodes(self, low: int, high: int) -> bool:
        """Whether any level between two degrees does."""
        return any(self.rungs.scope(level) is Scope.INTER for level in self.rungs.levels(low, high))

    def in_eight_bits(self, transfer: Transfer, degree: int) -> bool:
        """Whether the transfer travels so from this degree upwards."""
        return transfer.form is not None and self.scope_above(degree) is Scope.INTER


def _cut(parcel: Parcel, parts: int) -> list[Parcel]:
    length = (parcel.end - parcel.begin) // parts
    return [parcel.part(parcel.begin + turn * length, parcel.begin + (turn + 1) * length) for turn in range(parts)]
