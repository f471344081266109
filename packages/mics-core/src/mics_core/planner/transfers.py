"""What the ladder moves for a unit: descents and climbs as steps on links, and the sums in memory between them.

A way that leaves the nodes has two stages on two lanes, as in ladder.py: while one unit is between nodes, another is
inside them.
"""

from __future__ import annotations

from functools import lru_cache

from mics_core.planner.candidate import Candidate
from mics_core.planner.cluster import Transport
from mics_core.planner.collectives import Collectives, Move
from mics_core.topology import Link, Rungs, Topology

GATHER, HOP1, RISE, FALL = "gather", "hop 1", "hop 2", "sync, refresh"

Moves = tuple[Move, ...]
Stages = tuple[tuple[str, Moves], ...]
"""Lanes in the order in which a job passes them, and what it does on each."""


class Transfers:
    """The moves of one candidate's sharding; of units of one size they are worked out once."""

    def __init__(self, collectives: Collectives, candidate: Candidate) -> None:
        cluster = collectives.cluster
        self._collectives = collectives
        self._sharding = candidate.sharding
        self._precision = candidate.precision
        per_node = candidate.ranks_per_node or cluster.ranks_per_node
        self._rungs = Rungs.of(candidate.sharding, Topology(cluster.ranks, per_node))
        self._sums_itself = cluster.transport is Transport.GLOO  # else the collective does
        self.gather = lru_cache(None)(self._gather)
        self.hop1 = lru_cache(None)(self._hop1)
        self.convert = lru_cache(None)(self._convert)
        self.rise = lru_cache(None)(self._rise)
        self.fall = lru_cache(None)(self._fall)
        self.refresh = lru_cache(None)(self._refresh)

    def total(self) -> list[tuple[str, Move]]:
        """The norm's few bytes on their way through all ranks that hold one copy, each on the lane it takes."""
        found = []
        for step in self._rungs.steps(1, self._sharding.optimizer):
            route = GATHER if self._rungs.degrees[step] < self._sharding.params else FALL
            found.append((self._lane(route, step), self._collectives.step("gather", self._rungs, step, 16)))
        return found

    def _gather(self, size: int) -> Stages:
        return self._descend(GATHER, size, self._sharding.params, 1, self._precision.compute.itemsize)

    def _hop1(self, trained: int, *, first: bool) -> Stages:
        """Up to G, and onto the sum of the micro-steps before."""
        g = self._sharding.grads
        sums = trained // g * self._precision.master.itemsize
        return self._climb(HOP1, trained, 1, g, sums if first else 2 * sums)

    def _convert(self, trained: int) -> Stages:
        """The gradient into the dtype that travels, where it is not the master's."""
        g = self._sharding.grads
        if self._precision.reduce == self._precision.master or g == self._rungs.degrees[-1]:
            return ()
        return ((self._lane(RISE, self._rungs.degrees.index(g)), (self._memory(trained // g * self._both),)),)

    def _rise(self, trained: int) -> Stages:
        """Hop 2, up to all ranks."""
        world = self._rungs.degrees[-1]
        ends = self._precision.master if self._sharding.optimizer == world else self._precision.reduce
        return self._climb(RISE, trained, self._sharding.grads, world, trained // world * ends.itemsize)

    def _fall(self, trained: int) -> Stages:
        """The sync, down to O, in the dtype that travels."""
        o = self._sharding.optimizer
        stages = self._descend(FALL, trained, self._rungs.degrees[-1], o, self._precision.reduce.itemsize)
        if not stages or self._precision.reduce == self._precision.master:
            return stages
        *before, (lane, moves) = stages
        return (*before, (lane, (*moves, self._memory(trained // o * self._both))))

    def _refresh(self, trained: int) -> Stages:
        o, p = self._sharding.optimizer, self._sharding.params
        return self._descend(FALL, trained, o, p, self._precision.compute.itemsize)

    @property
    def _both(self) -> int:
        return self._precision.reduce.itemsize + self._precision.master.itemsize

    def _descend(self, route: str, size: int, high: int, low: int, itemsize: int) -> Stages:
        found: dict[str, Moves] = {}
        for step in reversed(self._rungs.steps(low, high)) if size else ():
            piece = size / self._rungs.degrees[step + 1] * itemsize
            lane = self._lane(route, step)
            found[lane] = (*found.get(lane, ()), self._collectives.step("gather", self._rungs, step, piece))
        return tuple(found.items())

    def _climb(self, route: str, size: int, low: int, high: int, written: float) -> Stages:
        """Up, with a sum in memory behind each step; the last one reads and writes so many bytes beside its parts."""
        found: dict[str, Moves] = {}
        for step in self._rungs.steps(low, high):
            below, above = self._rungs.degrees[step : step + 2]
            piece = size / above * self._precision.reduce.itemsize
            parts = above // below if self._sums_itself else 1
            count = parts * piece + (written if above == high else piece)
            sums = self._sums_itself or above == high  # else the collective has left the sum where it is wanted
            lane = self._lane(route, step)
            moved = self._collectives.step("reduce", self._rungs, step, piece)
            found[lane] = (*found.get(lane, ()), moved, *([self._memory(count)] if sums else []))
        return tuple(found.items())

    def _lane(self, route: str, step: int) -> str:
        """At the top what rises and what falls takes turns."""
        link = self._rungs.link(step)
        top = link is self._rungs.link(len(self._rungs.degrees) - 2)
        name = "slow" if top and route in (RISE, FALL) else route
        return f"{name} {'in' if link is Link.NODE else 'between'} nodes"

    def _memory(self, count: float) -> Move:
        return Move(None, self._collectives.memory(count))
