"""A small event-driven simulation: work in lanes, one after another, that meets on links.

A lane is what runs in order, here the computation, too. A link carries one transfer at a time, in the
order in which they come to it; a transfer's latency keeps its lane waiting, and not the link.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

from mics_core.planner.collectives import Move

COMPUTE = "compute"


class Task:
    """Work of a lane, and when it ran."""

    __slots__ = ("begin", "end", "followers", "lane", "missing", "moves", "name", "ready")

    def __init__(self, lane: str, name: str, moves: Sequence[Move]) -> None:
        self.lane = lane
        self.name = name
        self.moves = moves
        self.followers: list[Task] = []
        self.missing = 0
        self.ready = self.begin = self.end = 0.0


class TaskGraph:
    """Tasks in the order in which the host hands them out."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self._last: dict[str, Task] = {}

    def compute(self, name: str, seconds: float, after: Iterable[Task | None] = ()) -> Task:
        """Computation for so long, which waits for these tasks."""
        return self._add(COMPUTE, name, (Move(None, seconds),), after)

    def send(self, lane: str, name: str, moves: Sequence[Move], after: Iterable[Task | None] = ()) -> Task:
        """A job of a lane, which may begin after what was computed so far and after these tasks."""
        return self._add(lane, name, moves, (self._last.get(COMPUTE), *after))

    def run(self) -> float:
        """Give every task its begin and end; the seconds until all have ended."""
        free: dict[str | None, float] = {}
        queue: list[tuple[float, int, int, Task]] = []
        number = 0
        for task in self.tasks:
            if not task.missing:
                heappush(queue, (0.0, number, 0, task))
                number += 1
        last = 0.0
        while queue:
            now, _, part, task = heappop(queue)
            if part == 0:
                task.begin = now
            if part < len(task.moves):
                move = task.moves[part]
                start = now
                if move.link is not None:
                    start = max(now, free.get(move.link, 0.0))
                    free[move.link] = start + move.busy
                heappush(queue, (start + move.busy + move.latency, number, part + 1, task))
                number += 1
                continue
            task.end = now
            last = max(last, now)
            for follower in task.followers:
                follower.missing -= 1
                if not follower.missing:
                    heappush(queue, (now, number, 0, follower))
                    number += 1
        return last

    def _add(self, lane: str, name: str, moves: Sequence[Move], after: Iterable[Task | None]) -> Task:
        task = Task(lane, name, moves)
        for earlier in dict.fromkeys((*after, self._last.get(lane))):
            if earlier is not None:
                earlier.followers.append(task)
                task.missing += 1
        self._last[lane] = task
        self.tasks.append(task)
        return task
