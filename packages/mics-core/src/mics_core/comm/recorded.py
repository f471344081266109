"""The third make of world, groups and lanes: one process that pretends to be one rank of any world, and writes down
what it asks for. Nothing travels, and no process group and no GPU is needed.

The lanes are the GPU's own, on streams that only take notes. So a program is what a GPU would be asked to do: the
planner plays it on a cluster's links, and tests check its order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

import torch

from mics_core.comm.counters import Counters
from mics_core.comm.groups import Group, Membership, Messages
from mics_core.comm.lanes import DONE, Lane, StreamLane, Work
from mics_core.comm.questions import Answers
from mics_core.comm.world import World

COMPUTE = "compute"
"""The stream on which the model computes."""


class Kind(Enum):
    """What a stream is asked to do."""

    COMPUTE = "compute"
    MEMORY = "memory"  # bytes read and written in a rank's own memory
    SEND = "send"  # bytes to the peers of a level, each
    QUESTION = "question"  # a few bytes from every host to every other
    ANSWER = "answer"  # the host waits for it
    RECORD = "record"  # an event
    WAIT = "wait"  # for an event


@dataclass(frozen=True)
class Entry:
    """One thing in a stream's queue."""

    stream: str
    kind: Kind
    what: str = ""
    count: int = 0  # bytes, or the number of an event or question
    peers: tuple[int, ...] = ()


class Program:
    """What the host has asked for, in its order. It stands in for torch.cuda where lanes ask for streams and events."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._compute = RecordedStream(self, COMPUTE)
        self._current = self._compute
        self._events = 0

    def add(self, kind: Kind, what: str = "", count: int = 0, peers: tuple[int, ...] = ()) -> None:
        """The current stream is asked for this."""
        self.note(Entry(self._current.name, kind, what, count, peers))

    def note(self, entry: Entry) -> None:
        """Write it down; the one place where entries come in."""
        self.entries.append(entry)

    def number(self) -> int:
        """Of the next event or question."""
        self._events += 1
        return self._events

    # ---- as torch.cuda

    def current_stream(self, device: torch.device | None = None) -> RecordedStream:  # noqa: ARG002
        """The stream that is asked now."""
        return self._current

    @contextmanager
    def stream(self, stream: RecordedStream) -> Iterator[None]:
        """Inside, this stream is asked."""
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def Event(self) -> RecordedEvent:
        """A new event."""
        return RecordedEvent(self)


class RecordedStream:
    """A queue that takes notes."""

    def __init__(self, program: Program, name: str) -> None:
        self.name = name
        self.job = ""  # that it is asked for now
        self._program = program

    def wait_event(self, event: RecordedEvent) -> None:
        """What follows here comes after what the event stands for."""
        self._program.note(Entry(self.name, Kind.WAIT, count=event.number))

    def wait_stream(self, other: RecordedStream) -> None:
        """What follows here comes after all that the other stream has been asked for."""
        event = RecordedEvent(self._program)
        event.record(other)
        self.wait_event(event)


class RecordedEvent:
    """A place in a stream's queue."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.number = 0

    def record(self, stream: RecordedStream) -> None:
        """It stands for all that the stream has been asked for."""
        self.number = self._program.number()
        self._program.note(Entry(stream.name, Kind.RECORD, stream.job, self.number))


class _RecordedLane(StreamLane):
    """Notes what a job is called, too."""

    def submit(self, what: str, job: Callable[[], None], after: Sequence[Work] = ()) -> Work:
        """As of any lane."""
        self._stream.job = what
        return super().submit(what, job, after)


class RecordedGroup:
    """Writes down what each rank sends to each other one. What peers would send is made of what this rank has."""

    def __init__(self, program: Program, membership: Membership, *, sums: bool) -> None:
        self.membership = membership
        self._program = program
        self._sums = sums  # as NCCL does; else what arrives is summed by the runtime

    def all_gather(self, out: torch.Tensor, piece: torch.Tensor) -> None:
        """As of any group."""
        for other in out.view(len(self.membership.ranks), -1) if not out.is_meta else ():
            if other.data_ptr() != piece.data_ptr():
                other.copy_(piece)
        self._program.add(Kind.SEND, "gather", piece.nbytes, self.membership.ranks)

    def exchange(self, source: torch.Tensor) -> list[torch.Tensor]:
        """As of any group."""
        parts = source.view(len(self.membership.ranks), -1)
        mine = parts[self.membership.index]
        self._program.add(Kind.SEND, "reduce", mine.nbytes, self.membership.ranks)
        if not self._sums:
            return list(parts)
        if not source.is_meta:
            mine.copy_(parts.sum(0))
        return [mine]

    def swap(self, leaving: Messages, arriving: Messages) -> None:
        """As of any group; where what leaves for a rank differs in length, the program has the mean of them."""
        others = [other for other in range(len(self.membership.ranks)) if other != self.membership.index]
        count = sum(message.nbytes for other in others for message in leaving[other]) // len(others)
        for other in others:
            for into, given in zip(arriving[other], leaving[other], strict=False):
                if not into.is_meta:
                    length = min(len(into), len(given))
                    into[:length].copy_(given[:length])
                    into[length:].zero_()
        self._program.add(Kind.SEND, "swap", count, self.membership.ranks)


class RecordedCounters(Counters):
    """Writes down what is moved in memory, too."""

    def __init__(self, program: Program) -> None:
        super().__init__(torch.device("cpu"))
        self._program = program

    def moved(self, operation: str, count: int) -> None:
        """As of any counters."""
        super().moved(operation, count)
        self._program.add(Kind.MEMORY, operation, count)


class RecordedWorld(World):
    """One rank of so many, all of which say what this one says; its groups sum as NCCL does, or leave that to us."""

    def __init__(
        self,
        size: int,
        rank: int = 0,
        device: torch.device | str = "cpu",
        *,
        sums: bool = True,
        program: Program | None = None,
    ) -> None:
        self._sums = sums
        self.program = Program() if program is None else program
        self.streams = self.program
        self.device = torch.device(device)
        self.ranks, self.rank, self.size, self.whole = tuple(range(size)), rank, size, False
        self._lanes: dict[str, Lane] = {}

    def all_gather_object(self, mine: object, what: str) -> list[object]:  # noqa: ARG002
        """As of any world."""
        return [mine] * self.size

    def max_async(self, mine: Sequence[int], what: str) -> Answers:
        """As of any world."""
        numbers = torch.tensor(mine, dtype=torch.uint8)
        if self.size == 1 or not mine:
            return Answers(numbers, DONE)
        number = self.program.number()
        self.program.add(Kind.QUESTION, what, number)
        return Answers(numbers, _RecordedAnswer(self.program, number))

    def broadcast(self, flat: torch.Tensor) -> None:
        """As of any world."""

    def with_own_group(self, name: str) -> World:  # noqa: ARG002
        """As of any world."""
        return self

    def _control_group(self, ranks: tuple[int, ...], name: str) -> None:
        """Questions need none."""

    def lane(self, name: str, *, urgent: bool = False) -> Lane:  # noqa: ARG002
        """As of any world."""
        if name not in self._lanes:
            self._lanes[name] = _RecordedLane(RecordedStream(self.program, name), self.program)
        return self._lanes[name]

    def group(self, members: Sequence[int], name: str) -> Group:
        """As of any world."""
        return RecordedGroup(self.program, Membership(tuple(members), members.index(self.rank), name), sums=self._sums)

    def counters(self) -> Counters:
        """As of any world."""
        return RecordedCounters(self.program)


@dataclass(frozen=True)
class _RecordedAnswer:
    program: Program
    number: int

    def wait(self) -> None:
        self.program.add(Kind.ANSWER, count=self.number)
