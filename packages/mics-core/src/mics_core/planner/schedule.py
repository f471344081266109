"""The runtime's schedule, step after step: gather.py, reduce.py and lifecycle.py as tasks with seconds.

What the host decides (which units are gathered ahead, kept, released) depends on the order of units alone, never on
time; so a step is a fixed set of tasks with fixed dependencies, and only who comes first to a link is left to the
simulation. The lanes are those of ladder.py: one inside nodes and one between them for each route.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mics_core.planner.arithmetic import Arithmetic
from mics_core.planner.candidate import Candidate, System
from mics_core.planner.collectives import Collectives
from mics_core.planner.engine import Program, Task
from mics_core.planner.transfers import Stages, Transfers

if TYPE_CHECKING:
    from mics_core.planner.workload import Workload

CONTROL = "control"


class Station:
    """A unit: its seconds, its bytes, and where it is."""

    def __init__(self, number: int, name: str, trained: int, frozen: int, itemsize: int) -> None:
        self.number = number
        self.name = name
        self.trained = trained
        self.frozen = frozen
        self.bytes = (trained + frozen) * itemsize
        self.users = 0
        self.here = False  # or on its way
        self.arrival: Task | None = None
        self.refreshed: Task | None = None
        self.latest: Task | None = None  # of its gradient


class Ours:
    """The tasks of our steps."""

    def __init__(self, program: Program, workload: Workload, collectives: Collectives, candidate: Candidate) -> None:
        self._program = program
        self._candidate = candidate
        self._collectives = collectives
        self._arithmetic = Arithmetic(collectives.cluster, candidate, System.MICS)
        self._transfers = Transfers(collectives, candidate)
        units = (workload.root, *workload.units)
        itemsize = candidate.precision.compute.itemsize
        self._stations = [
            Station(number, unit.name, unit.size.trained, unit.size.frozen, itemsize)
            for number, unit in enumerate(units)
        ]
        self._work = [self._arithmetic.unit(unit, root=number == 0) for number, unit in enumerate(units)]
        forwards = list(range(len(units)))
        self._pass = [*forwards, 0, *reversed(forwards[1:])]  # the order of units in a forward and its backward
        self._seen = 0
        self._again = False
        self._travels = candidate.sharding.params > 1
        self._budget = candidate.prefetch_units * max(station.bytes for station in self._stations)
        self._ahead = 0
        self._staging: list[Task | None] = [None, None]
        stages = max((len(self._transfers.rise(station.trained)) for station in self._stations), default=0)
        self._wires: list[Task | None] = [None] * stages  # buffers of gradients in the dtype that travels

    def step(self, micro_steps: int) -> list[Task]:
        """One optimizer step; the last computation of every micro-step, and of the step."""
        question = self._program.send(CONTROL, "question", [self._collectives.asking()])
        ends = []
        for number in range(micro_steps):
            self._again = number < micro_steps - 1
            self._forward()
            self._backward(question, first=number == 0)
            ends.append(self._program.compute("end of backward", 0.0))
        answers = self._program.send(CONTROL, "answers", [self._collectives.asking()])
        ends.append(self._update(answers))
        return ends

    def _forward(self) -> None:
        root, *units = self._stations
        work = self._work[0]
        self._use(root)
        self._program.compute("enter root", work.host, [root.arrival])
        for station in units:
            self._use(station)
            each = self._work[station.number]
            self._program.compute(f"forward {station.name}", each.forward + each.host, [station.arrival])
            self._leave(station, keep=self._is_next(station))
        self._program.compute(f"forward {root.name}", work.forward)
        self._leave(root, keep=self._is_next(root))

    def _backward(self, question: Task, *, first: bool) -> None:
        root, *units = self._stations
        work = self._work[0]
        self._use(root)
        self._program.compute(f"backward {root.name}", work.backward, [root.arrival, question])
        before: Station | None = None
        for station in reversed(units):
            self._finish(before)
            self._use(station)
            each = self._work[station.number]
            self._program.compute(f"backward {station.name}", each.backward + each.host, [station.arrival])
            self._reduce(station, first=first)
            before = station
        if root.trained:
            self._program.compute("leave root", work.host)
            self._reduce(root, first=first)
        self._seen = 0
        self._finish(before)
        self._finish(root)
        if self._again:
            self._fetch()
        else:
            for station in self._stations:
                self._release(station)

    def _update(self, answers: Task) -> Task:
        """The clip waits for everything; then every unit is updated, and its refresh begins."""
        trained = [station for station in self._stations if station.trained]
        program, optimizer = self._program, self._candidate.sharding.optimizer
        norms = sum(self._arithmetic.norm(station.trained // optimizer) for station in trained)
        done = program.compute("norm", norms, [answers, *(station.latest for station in trained)])
        for lane, move in self._transfers.total():
            done = program.compute("clip", 0.0, [program.send(lane, "norm", [move])])
        for station in trained:
            seconds = self._arithmetic.update(station.trained // optimizer) + self._work[station.number].host
            done = program.compute(f"update {station.name}", seconds)
            station.refreshed = self._send(f"refresh {station.name}", self._transfers.refresh(station.trained), None)
            if not self._travels:
                station.arrival = station.refreshed
        return done

    def _reduce(self, station: Station, *, first: bool) -> None:
        """Hop 1, and hop 2 behind it in the last micro-step."""
        if not station.trained:
            return
        transfers, size = self._transfers, station.trained
        hop1 = transfers.hop1(size, first=first)
        seconds = self._arithmetic.pack(size, travels=bool(hop1), first=first)
        self._program.compute(f"pack {station.name}", seconds, [self._staging[1] if hop1 else station.latest])
        if hop1:
            station.latest = self._send(f"hop 1 {station.name}", hop1, station.latest)
            self._staging = [station.latest, self._staging[0]]
        if not self._again:
            self._sync(station)

    def _sync(self, station: Station) -> None:
        """Hop 2: up to all ranks, and down to O."""
        transfers, size, name = self._transfers, station.trained, f"hop 2 {station.name}"
        convert = transfers.convert(size)
        if convert:
            station.latest = self._send(name, convert, station.latest, self._wires[-1])
        for stages in (transfers.rise(size), transfers.fall(size)):
            station.latest = self._send(name, stages, station.latest)
        if convert:
            self._wires = [station.latest, *self._wires[:-1]]

    def _send(self, name: str, stages: Stages, *after: Task | None) -> Task | None:
        """A job that passes some lanes; what it waited for if it has nothing to do."""
        for lane, moves in stages:
            after = (self._program.send(lane, name, moves, after),)
        return after[0]

    # ---- what gather.py and order.py decide

    def _use(self, station: Station) -> None:
        self._seen += 1
        if not self._travels:
            return
        if not station.users and station.here:
            self._ahead -= station.bytes
        station.users += 1
        if not station.here:
            self._start(station)
        self._fetch()

    def _upcoming(self) -> Iterator[Station]:
        for number in self._pass[self._seen :]:
            yield self._stations[number]
        if self._again:
            for number in self._pass:
                yield self._stations[number]

    def _fetch(self) -> None:
        if not self._travels:
            return
        for station in self._upcoming():
            if not station.here:
                if self._ahead + station.bytes > self._budget:
                    return
                self._start(station)
                self._ahead += station.bytes

    def _is_next(self, station: Station) -> bool:
        for each in self._upcoming():
            if each is station:
                return True
            if not each.users:
                return False
        return False

    def _leave(self, station: Station, *, keep: bool) -> None:
        if not self._travels:
            return
        station.users -= 1
        if not station.users:
            self._ahead += station.bytes
            if not keep:
                self._release(station)

    def _finish(self, station: Station | None) -> None:
        """A backward is over, which shows when the next one begins."""
        if station is not None:
            self._leave(station, keep=self._again and self._is_next(station))

    def _release(self, station: Station) -> None:
        if self._travels and station.here and not station.users:
            station.here = False
            self._ahead -= station.bytes

    def _start(self, station: Station) -> None:
        for size in (station.trained, station.frozen):
            if size:
                stages = self._transfers.gather(size)
                station.arrival = self._send(f"gather {station.name}", stages, station.refreshed)
        station.here = True
