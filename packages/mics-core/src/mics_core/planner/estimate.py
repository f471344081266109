"""How long a step takes, by sums: quick enough for every way to train, and near enough to say which to simulate.

A step has three phases, and only inside one can computation hide what links carry: the first forward, for which the
refresh must end; the micro-steps from there to the last backward; and that backward, behind which hop 2 must end.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from mics_core.comm.ladder import Route, lane_name
from mics_core.planner.arithmetic import Arithmetic
from mics_core.planner.candidate import Candidate, System
from mics_core.planner.cluster import Cluster, Transport
from mics_core.planner.collectives import Collectives, Move
from mics_core.planner.memory import formula_of
from mics_core.spec.formula import Formula, UnitSize

if TYPE_CHECKING:
    from mics_core.planner.workload import Workload

_ROUTES = {
    "gather": Route.GATHER,
    "hop 1": Route.HOP1,
    "hop 2": Route.HOP2,
    "sync": Route.REFRESH,
    "refresh": Route.REFRESH,
}
"""Which way an action of the formula goes."""

_UNCOVERED = 0.1
"""Of what the longest work of a phase could cover, so much stays uncovered: the first and the last units' part."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step."""

    least: float  # that it takes at least
    likely: float  # to sort by


class _Phase:
    """Seconds in which the computation, links and lanes work during a part of a step."""

    def __init__(self) -> None:
        self.compute = 0.0
        self._links: dict[str, float] = defaultdict(float)
        self._lanes: dict[str, float] = defaultdict(float)  # with latencies

    def send(self, moves: Mapping[str, Sequence[Move]], times: int) -> None:
        for lane, each in moves.items():
            for move in each:
                self._lanes[lane] += times * (move.busy + move.latency)
                if move.link is not None:
                    self._links[move.link] += times * move.busy

    def __add__(self, other: _Phase) -> _Phase:
        total = _Phase()
        for each in (self, other):
            total.compute += each.compute
            for mine, theirs in ((total._links, each._links), (total._lanes, each._lanes)):
                for name, seconds in theirs.items():
                    mine[name] += seconds
        return total

    def least(self) -> float:
        return max((self.compute, *self._links.values(), *self._lanes.values()))

    def likely(self) -> float:
        works = (self.compute, *self._links.values())
        return self.least() + _UNCOVERED * (sum(works) - max(works))


class _Transfers:
    """What one candidate moves for units, by lane; of units of one size it is worked out once."""

    def __init__(self, collectives: Collectives, formula: Formula) -> None:
        self._collectives = collectives
        self._formula = formula
        self._sums_itself = collectives.cluster.transport is Transport.GLOO  # else the collective does
        self.of = lru_cache(None)(self._of)

    def _of(self, action: str, size: UnitSize) -> dict[str, list[Move]]:
        found: dict[str, list[Move]] = defaultdict(list)
        rungs, levels = self._formula.rungs, self._formula.sends(action, size)
        sums = action.startswith("hop")
        for level, sent in levels:
            peers, scope = rungs.members(0, level), rungs.scope(level)
            piece, coded = sent / (len(peers) - 1), self._formula.form(action, size, level) is not None
            collective = "swap" if coded else "reduce" if sums else "gather"
            moves = found[f"{lane_name(rungs, _ROUTES[action], scope)}, {scope.value}"]
            moves.append(self._collectives.send(collective, peers, piece))
            itself = self._sums_itself or coded
            if sums and (itself or level == levels[-1][0]):
                parts = len(peers) if itself else 1
                moves.append(Move(None, self._collectives.memory((parts + 1) * piece)))
            if coded:  # read in 16 or 32 bits, and written in 8, or the other way
                moves.append(Move(None, self._collectives.memory(4 * len(peers) * piece)))
        return dict(found)

    def seconds(self, action: str, size: UnitSize) -> float:
        """From the beginning of a transfer to its end, if nothing is in its way."""
        return sum(move.busy + move.latency for moves in self.of(action, size).values() for move in moves)


class Estimates:
    """Of one model on one cluster; units that are alike are counted once."""

    def __init__(self, workload: Workload, cluster: Cluster) -> None:
        self._collectives = Collectives(cluster)
        self._workload = workload
        self._root, units = workload.root, workload.units
        self._units = Counter(replace(unit, name="") for unit in units)
        # A unit that is used again at once is kept: the last one between the passes, the first one between micro-steps.
        self._forward = Counter(unit.size for unit in (workload.root, *units))
        self._backward = Counter(unit.size for unit in units[:-1])
        self._again = self._backward + Counter(unit.size for unit in units[1:])

    def of(self, candidate: Candidate) -> Estimate:
        """What the schedule of mics takes in the steady state."""
        transfers = _Transfers(self._collectives, formula_of(self._workload, candidate, self._collectives.cluster))
        first, between, last, gathers = _Phase(), _Phase(), _Phase(), _Phase()
        arithmetic = Arithmetic(self._collectives.cluster, candidate, System.MICS)
        again, optimizer = candidate.micro_steps - 1, candidate.sharding.optimizer
        for unit, times in ((self._root, 1), *self._units.items()):
            trained = unit.size.trained
            hop1 = transfers.of("hop 1", unit.size)
            work = arithmetic.unit(unit, root=unit is self._root)
            backward = work.backward + work.host + arithmetic.pack(trained, travels=bool(hop1), first=True)
            update = arithmetic.norm(trained // optimizer) + arithmetic.update(trained // optimizer)
            first.compute += times * (update + work.forward + work.host)
            between.compute += times * again * (backward + work.forward + work.host)
            last.compute += times * backward
            first.send(transfers.of("refresh", unit.size), times)
            between.send(hop1, times * again)
            for action in ("hop 1", "hop 2", "sync"):
                last.send(transfers.of(action, unit.size), times)
        phases = ((first, self._forward, 1), (between, self._again, again), (gathers, self._backward, 1))
        for phase, sizes, times in phases:
            for size, count in sizes.items():
                parts = (UnitSize(size.trained, 0), UnitSize(size.frozen, 0))
                for part in parts:
                    phase.send(transfers.of("gather", part), times * count)
                if not candidate.prefetch_units:  # computation stands still until the longer one is there
                    longer = max(transfers.seconds("gather", part) for part in parts)
                    phase.compute += times * count * longer
        # Gathers of the last backward may begin before it, so that the least of it is without them.
        least = first.least() + between.compute + last.least()
        whole = first + between + last + gathers
        return Estimate(max(least, whole.least()), first.likely() + between.likely() + (last + gathers).likely())
