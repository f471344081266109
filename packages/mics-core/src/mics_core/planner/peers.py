"""The peers' schedules, as tasks with seconds: DDP, FSDP2 and HSDP, ZeRO-3.

On GPUs they hide what they can: transfers run beside the computation. On CPUs the thread that computes waits for
FSDP2's sums of gradients and for all that DeepSpeed sends (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mics_core.errors import ConfigError
from mics_core.planner.arithmetic import Arithmetic, Work
from mics_core.planner.candidate import Candidate, System
from mics_core.planner.cluster import Transport
from mics_core.planner.collectives import Collectives, Move
from mics_core.planner.engine import Task, TaskGraph

if TYPE_CHECKING:
    from mics_core.planner.workload import UnitWork, Workload

GATHER, REDUCE, ALL_REDUCE = "gather", "reduce", "all-reduce"
BUCKET, FIRST_BUCKET = 25 * 2**20, 2**20
"""DDP's default buckets: bytes of gradients that travel together; the first one is small, so that it leaves soon."""


class _Peer:
    """What the peers' steps have in common."""

    system: System

    def __init__(self, graph: TaskGraph, workload: Workload, collectives: Collectives, candidate: Candidate) -> None:
        self._graph = graph
        self._collectives = collectives
        self._precision = candidate.precision
        self._arithmetic = Arithmetic(collectives.cluster, candidate, self.system)
        self._root, self._units = workload.root, workload.units
        self._work = {
            unit.name: self._arithmetic.unit(unit, root=unit is self._root) for unit in (self._root, *self._units)
        }
        self._blocking = collectives.cluster.transport is Transport.GLOO

    def _compute(self, way: str, unit: UnitWork, after: Task | None) -> Task:
        work: Work = self._work[unit.name]
        seconds = (work.forward if way == "forward" else work.backward) + work.host
        return self._graph.compute(f"{way} {unit.name}", seconds, [after])

    def _update(self, elements: int, after: Sequence[Task | None], norm: Move) -> Task:
        """Clip and step."""
        graph = self._graph
        graph.compute("norm", self._arithmetic.norm(elements), after)
        total = graph.send(ALL_REDUCE, "norm", [norm])
        graph.compute("clip", 0.0, [total])
        host = sum(work.host for work in self._work.values())
        return graph.compute("update", self._arithmetic.update(elements) + host)


class DDP(_Peer):
    """Whole copies; buckets of gradients, filled in the order of the backward, are summed over all ranks behind it."""

    system = System.DDP

    def step(self, micro_steps: int) -> list[Task]:
        """One optimizer step; the last computation of every micro-step, and of the step."""
        ends = []
        for number in range(micro_steps):
            for unit in self._units:
                self._compute("forward", unit, None)
            self._compute("forward", self._root, None)
            self._compute("backward", self._root, None)
            sums = self._backward(last=number == micro_steps - 1)
            ends.append(self._graph.compute("end of backward", 0.0, sums))
        elements = sum(unit.size.trained for unit in (self._root, *self._units))
        ends.append(self._update(elements, [], Move(None, 0.0)))
        return ends

    def _backward(self, *, last: bool) -> list[Task]:
        sums: list[Task] = []
        waiting, limit = 0.0, FIRST_BUCKET
        itemsize = self._precision.reduce.itemsize
        for unit in (*reversed(self._units), self._root):
            if unit is not self._root:
                self._compute("backward", unit, None)
            waiting += unit.size.trained * itemsize
            while last and waiting >= limit:
                sums.append(self._send(min(limit, waiting)))
                waiting -= min(limit, waiting)
                limit = BUCKET
        if last and waiting:
            sums.append(self._send(waiting))
        return sums

    def _send(self, count: float) -> Task:
        everyone = self._collectives.contiguous(self._collectives.cluster.ranks)
        return self._graph.send(ALL_REDUCE, "bucket", [self._collectives.ring("all-reduce", everyone, count)])


class FSDP2(_Peer):
    """Cut into O pieces, between forward and backward into P; with O below all ranks it is HSDP."""

    system = System.FSDP2

    def __init__(self, graph: TaskGraph, workload: Workload, collectives: Collectives, candidate: Candidate) -> None:
        super().__init__(graph, workload, collectives, candidate)
        self._kept, self._cut = candidate.sharding.params, candidate.sharding.optimizer
        world = collectives.cluster.ranks
        if world % self._cut or self._cut % self._kept:
            raise ConfigError(
                f"simulate: {self.system.value} is cut into {self._kept} and {self._cut} pieces, expected divisors of "
                f"the {world} ranks, one of the other: take scaling.peer"
            )
        self._replicas = collectives.strided(self._cut)
        self._prefetches = True

    def step(self, micro_steps: int) -> list[Task]:
        """One optimizer step; the last computation of every micro-step, and of the step."""
        ends = []
        sums: list[Task | None] = []
        for number in range(micro_steps):
            for _ in self._pass("forward", [*self._units, self._root], self._cut):
                pass
            backward = self._pass("backward", [self._root, *reversed(self._units)], self._kept)
            sums = [self._reduce(unit, last=number == micro_steps - 1) for unit in backward]
            ends.append(self._graph.compute("end of backward", 0.0))
        elements = sum(unit.size.trained for unit in (self._root, *self._units)) // self._cut
        ring = self._collectives.contiguous(self._cut)
        ends.append(self._update(elements, sums, self._collectives.ring("all-reduce", ring, 16)))
        return ends

    def _pass(self, way: str, units: list[UnitWork], degree: int) -> Iterator[UnitWork]:
        """One unit after another; the next one's gather begins as soon as this one's has arrived."""
        coming = self._gather(units[0], degree)
        for unit, following in zip(units, [*units[1:], None], strict=True):
            arrived = self._graph.compute(f"copy out {unit.name}", self._copy_out(unit), [coming])
            if following is not None and self._prefetches:
                coming = self._gather(following, degree)
            self._compute(way, unit, arrived)
            yield unit
            if following is not None and not self._prefetches:
                coming = self._gather(following, degree)

    def _gather(self, unit: UnitWork, degree: int) -> Task | None:
        whole = (unit.size.trained + unit.size.frozen) * self._precision.compute.itemsize
        if not whole or degree == 1:
            return None
        move = self._collectives.ring("gather", self._collectives.contiguous(degree), whole)
        return self._graph.send(GATHER, f"gather {unit.name}", [move])

    def _copy_out(self, unit: UnitWork) -> float:
        """Out of the gathered buffer, which is ordered by ranks, into parameters."""
        return self._arithmetic.memory(2 * (unit.size.trained + unit.size.frozen) * self._precision.compute.itemsize)

    def _reduce(self, unit: UnitWork, *, last: bool) -> Task | None:
        graph, reduce, size = self._graph, self._precision.reduce.itemsize, unit.size.trained
        if not size:
            return None
        graph.compute(f"pack {unit.name}", self._arithmetic.pack(size, travels=True, first=True))
        ring = self._collectives.contiguous(self._cut)
        done = graph.send(REDUCE, f"reduce {unit.name}", [self._collectives.ring("reduce", ring, size * reduce)])
        if last and self._replicas.ranks > 1:
            move = self._collectives.ring("all-reduce", self._replicas, size // self._cut * reduce)
            done = graph.send(ALL_REDUCE, f"sum {unit.name}", [move], [done])
        if self._blocking:
            graph.compute(f"wait for {unit.name}", 0.0, [done])
        return done


class HSDP(FSDP2):
    """FSDP2 in groups."""

    system = System.HSDP


class ZeRO3(FSDP2):
    """DeepSpeed's stage 3: as FSDP2 over all ranks; on CPUs nothing is fetched ahead."""

    system = System.ZERO3

    def __init__(self, graph: TaskGraph, workload: Workload, collectives: Collectives, candidate: Candidate) -> None:
        super().__init__(graph, workload, collectives, candidate)
        self._prefetches = not self._blocking
