"""The rules of order, checked on a recording.

    R1  two accesses to the same bytes, one of them a write, are ordered by events
    R2  memory is used after it was taken and freed after it was used, as seen from the stream that took it
    R3  a buffer is refilled after its readers
    R4  what a group does comes in one order: on a rank by events, and the same on all ranks
    R5  the host reads after it has waited

Every stream counts what it does, the host, too. A stream knows how far every other one had come when it last waited for
it, directly or not. Taking and freeing memory are writes to all of it by the stream whose pool it comes from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from recording import Recording
from steps import HOST, Act, Step

Access = tuple[int, bool, int, int]
"""By which stream, whether it writes, from which byte, to which."""


def on_purpose(step: Step) -> bool:
    """The host looks at the loss scale of a step ago, or of this one: a warning that comes a step late is as good."""
    return step.what.startswith("tolist at loss_scaling.py")


def is_refresh(step: Step) -> bool:
    """Whether new weights are on their way from optimizers to the ranks that gather them."""
    return step.job.startswith("refresh of")


def overtaken(earlier: Step, later: Step) -> bool:
    """Whether a user writes to parameters while a refresh sends them, where they are the weights themselves (fp32).

    Nobody reads what arrives then: the next forward sees the write, waits for this refresh, and sends a second one.
    """
    return is_refresh(earlier) and later.what.partition(" at ")[2].startswith("scenarios.py")


@dataclass(frozen=True)
class Fault:
    """A rule that is broken, and by what."""

    rule: str
    earlier: Step
    later: Step

    def __str__(self) -> str:
        steps = (self.earlier, self.later)
        first, second = (f"{s.act.value} {s.what} on '{s.stream}'{f' in {s.job}' * bool(s.job)}" for s in steps)
        return f"{self.rule}: {first}  ||  {second}"

    @property
    def place(self) -> tuple[str, ...]:
        """The same for the same lines of code, whichever unit and step."""
        told = [(s.act.value, s.what.partition(" at ")[2], s.stream) for s in (self.earlier, self.later)]
        return (self.rule, *told[0], *told[1])


def faults(recording: Recording) -> list[Fault]:
    """What breaks R1, R2, R3, R5, or R4 on this rank; one for each pair of lines."""
    numbers = {name: number for number, name in enumerate(recording.streams)}
    host = numbers[HOST]
    clocks = [[0] * len(numbers) for _ in numbers]
    awaited = {step.until for step in recording.steps if step.act is Act.WAIT}
    then: dict[int, list[int]] = {}  # steps that others wait for -> what their stream knew
    seen: dict[int | str, dict[Access, tuple[int, Step]]] = defaultdict(dict)  # by block, or group
    found: dict[tuple[str, ...], Fault] = {}
    for step in recording.steps:
        me = numbers[step.stream]
        clock = clocks[me]
        if step.act is Act.WAIT:
            clocks[me] = [max(mine, theirs) for mine, theirs in zip(clock, then[step.until], strict=True)]
        else:
            clock[me] += 1
            for what, access in _accesses(step, me):
                past = seen[what]
                _, writes, begin, end = access
                for (stream, wrote, low, high), (time, other) in past.items():
                    if stream != me and (writes or wrote) and low < end and begin < high and clock[stream] < time:
                        rule = _rule(other, step, wrote, host in (stream, me))
                        meant = on_purpose(step) or on_purpose(other) or (rule == "R3" and overtaken(other, step))
                        if not meant:
                            fault = Fault(rule, other, step)
                            found.setdefault(fault.place, fault)
                past[access] = clock[me], step
        if step.number in awaited:
            then[step.number] = list(clocks[me])
    return list(found.values())


def _accesses(step: Step, stream: int) -> list[tuple[int | str, Access]]:
    if step.group is not None:
        return [(step.group[0], (stream, True, 0, 1))]
    if step.block is not None:
        return [(step.block.number, (stream, True, 0, step.block.size))]
    accesses = [(place, False) for place in step.reads] + [(place, True) for place in step.writes]
    return [
        (place.block.number, (stream, writes, *place.span))
        for place, writes in accesses
        if place.span[0] < place.span[1]
    ]


def _rule(earlier: Step, later: Step, wrote: bool, by_host: bool) -> str:
    if later.group is not None:
        return "R4"
    if Act.FREE in (earlier.act, later.act) or Act.TAKE in (earlier.act, later.act):
        return "R2"
    if by_host:
        return "R5"
    return "R1" if wrote else "R3"


def disagreements(recordings: Sequence[Recording]) -> list[str]:
    """What breaks R4 between the ranks of a world, all of which are here: groups whose ranks do different things.

    For which unit counts, too: where sizes agree, a unit's bytes would arrive in another one.
    """
    orders: dict[str, dict[int, list[tuple[str, str, int]]]] = defaultdict(dict)
    for rank, recording in enumerate(recordings):
        for step in recording.steps:
            if step.group is not None:
                name, what, count = step.group
                orders[name].setdefault(rank, []).append((step.job, what, count))
    found: list[str] = []
    for name, by_rank in orders.items():
        members = [int(number) for number in name.rpartition("(")[2].rstrip(",)").split(",")]
        first = by_rank.get(members[0])
        others = [rank for rank in members if by_rank.get(rank) != first]
        found += [f"R4: {name}: what rank {rank} does differs from rank {members[0]}" for rank in others]
    return found
