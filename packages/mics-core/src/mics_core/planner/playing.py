"""A recorded step as tasks with seconds: what streams were asked for, on a cluster's links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mics_core.comm.recorded import COMPUTE, Entry, Kind
from mics_core.planner.arithmetic import Arithmetic
from mics_core.planner.candidate import Candidate, System
from mics_core.planner.collectives import Collectives, Move
from mics_core.planner.engine import Task, TaskGraph
from mics_core.planner.recording import BACKWARD, END, FORWARD, Recorded, record

if TYPE_CHECKING:
    from mics_core.planner.workload import Workload

CONTROL = "control"


class Mics:
    """The steps of mics."""

    def __init__(self, graph: TaskGraph, workload: Workload, collectives: Collectives, candidate: Candidate) -> None:
        self._graph = graph
        self._collectives = collectives
        arithmetic = Arithmetic(collectives.cluster, candidate, System.MICS)
        self._seconds: dict[str, tuple[str, float]] = {}
        self._update = arithmetic.host  # that the host takes for a unit's
        self._names = {"the root": workload.root.name}  # of units, by what the stand-in calls them
        for number, unit in enumerate((workload.root, *workload.units)):
            work = arithmetic.unit(unit, root=number == 0)
            self._seconds[f"{FORWARD} {number}"] = f"{FORWARD} {unit.name}", work.forward + work.host
            self._seconds[f"{BACKWARD} {number}"] = f"{BACKWARD} {unit.name}", work.backward + work.host
            if number:
                self._names[f"units.{number - 1}"] = unit.name
        self._recorded = Recorded.of(workload, candidate, collectives.cluster)
        self._done: list[Task | None] = []  # by events of the step before, in their order

    def step(self, micro_steps: int) -> list[Task]:
        """One optimizer step; the last computation of every micro-step, and of the step."""
        before, entries = record(self._recorded, micro_steps)
        step = _Step(self._graph, self._collectives, self._seconds, self._names, self._update)
        ends = step.play(entries, self._earlier(before))
        self._done = list(step.done.values())
        return ends

    def _earlier(self, before: Sequence[Entry]) -> dict[int, Task | None]:
        """What the events of the step before stand for, counted from its end: its beginning may have been another."""
        events = [entry.count for entry in before if entry.kind in (Kind.RECORD, Kind.QUESTION)]
        return dict(zip(reversed(events), reversed(self._done), strict=False))


class _Step:
    """One step of the recording on its way to tasks."""

    def __init__(
        self,
        graph: TaskGraph,
        collectives: Collectives,
        seconds: Mapping[str, tuple[str, float]],
        names: Mapping[str, str],
        update: float,
    ) -> None:
        self._graph = graph
        self._collectives = collectives
        self._seconds = seconds
        self._names = names
        self._update = update
        self.done: dict[int, Task | None] = {}  # what an event stands for; None if that was there before
        self._after: list[Task | None] = []  # for which the computation waits
        self._last: Task | None = None  # of the computation
        self._jobs: dict[str, tuple[list[Task | None], list[Move]]] = {}  # of lanes, on their way

    def play(self, entries: Sequence[Entry], earlier: dict[int, Task | None]) -> list[Task]:
        ends = []
        for entry in entries:
            if entry.kind is Kind.WAIT:
                self._waits(entry.stream, self.done.get(entry.count, earlier.get(entry.count)))
            elif entry.kind is Kind.QUESTION:
                self.done[entry.count] = self._graph.send(CONTROL, entry.what, [self._collectives.asking()])
            elif entry.kind is Kind.ANSWER:
                self._after.append(self.done.get(entry.count, earlier.get(entry.count)))
            elif entry.kind is Kind.RECORD:
                self.done[entry.count] = self._end_of_job(entry)
            elif entry.stream != COMPUTE:
                self._jobs[entry.stream][1].append(self._move(entry))
            elif entry.kind is Kind.MEMORY:
                host = self._update if entry.what == "adamw" else 0.0
                self._compute(entry.what, self._collectives.memory(entry.count) + host)
            else:
                task = self._compute(*self._seconds.get(entry.what, (entry.what, 0.0)))
                if entry.what == END:
                    ends.append(task)
        return ends

    def _compute(self, name: str, seconds: float) -> Task:
        self._last = self._graph.compute(name, seconds, self._after)
        self._after = []
        return self._last

    def _waits(self, stream: str, task: Task | None) -> None:
        if stream == COMPUTE:
            self._after.append(task)
        else:
            self._jobs.setdefault(stream, ([], []))[0].append(task)

    def _end_of_job(self, entry: Entry) -> Task | None:
        if entry.stream != COMPUTE:
            after, moves = self._jobs.pop(entry.stream)
            action, of, unit = entry.what.partition(" of ")
            return self._graph.send(entry.stream, f"{action}{of}{self._names.get(unit, unit)}", moves, after)
        if any(self._after):
            self._compute("wait", 0.0)
        return self._last

    def _move(self, entry: Entry) -> Move:
        if entry.kind is Kind.MEMORY:
            return Move(None, self._collectives.memory(entry.count))
        return self._collectives.send(entry.what, entry.peers, entry.count)
