"""How fast a step can be at best: the shortest schedule that data dependencies allow, with the formula's bytes.

A node has one link, as fast up as down; what stays inside a node takes no time, and neither does a message's latency.
Then, from one step of the optimizer to the next:

- the computation takes its time;
- before it, a forward waits for what has come of the refresh, and of the first gathers, by the time it needs it;
- after it, the norm of all gradients waits for what of hop 1 and hop 2 the last backward did not cover;
- the link cannot carry all of a step's bytes in less time than they take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bench.scenes.model import StandIn
from mics_core.spec.formula import Formula, Traffic, UnitSize
from mics_core.spec.topology import Rungs


@dataclass(frozen=True)
class UnitTime:
    """Seconds of one unit: of its computation in a micro-step, and of its bytes on the link of a node."""

    forward: float = 0.0
    backward: float = 0.0
    gather: float = 0.0  # one of them
    gathers: int = 0  # in a step
    hop1: float = 0.0  # of one micro-step
    hop2: float = 0.0  # with the sync over replicas
    refresh: float = 0.0


def limit(units: Sequence[UnitTime], micro_steps: int, steps: int = 1) -> float:
    """Seconds of one of `steps` steps in a row, the units in the order of use.

    Before the first step nothing is under way, and the last one's refresh is waited for: with one step nothing covers
    it, with many it is the forward of the next one that does.
    """
    compute = micro_steps * sum(unit.forward + unit.backward for unit in units)
    refresh = sum(unit.refresh for unit in units)
    link = refresh + sum(unit.gathers * unit.gather + micro_steps * unit.hop1 + unit.hop2 for unit in units)
    tail = uncovered([unit.hop1 + unit.hop2 for unit in units], [unit.backward for unit in units])
    first = uncovered([unit.gather for unit in units], [unit.forward for unit in units])
    later = uncovered([unit.refresh + unit.gather for unit in units], [unit.forward for unit in units])
    in_a_row = max(link - refresh, first + compute + tail) + refresh
    return (in_a_row + (steps - 1) * max(link, later + compute + tail)) / steps


def uncovered(sends: Sequence[float], computes: Sequence[float]) -> float:
    """How much longer than the computations all takes, if unit i computes once what 0 to i need has been sent.

    The mirror image, where each sends what it has computed, from the last unit to the first, takes as long.
    """
    longest = sent = computed = 0.0
    for send, compute in zip(sends, computes, strict=True):
        sent += send
        longest = max(longest, sent - computed)
        computed += compute
    return longest


def unit_times(
    formula: Formula, stand_in: StandIn, rate_mbit: float, per_node: int, micro_steps: int
) -> list[UnitTime]:
    """What the formula says of every unit, the root first, on nodes of `per_node` ranks with links of that rate."""
    shares = {formula.rungs.name(level): leaving(formula.rungs, level, per_node) for level in _levels(formula.rungs)}
    seconds_per_byte = per_node * 8 / (rate_mbit * 1e6)
    root = UnitSize(0, 0)
    times = [_unit_time(replace(formula, units=(root,) * len(formula.units)), shares, micro_steps)]
    for number in range(len(formula.units)):
        only = tuple(unit if place == number else UnitSize(0, 0) for place, unit in enumerate(formula.units))
        times.append(_unit_time(replace(formula, root=root, units=only), shares, micro_steps))
    computing = [StandIn(), *[stand_in] * len(formula.units)]
    return [
        UnitTime(
            compute.forward,
            compute.backward,
            time.gather * seconds_per_byte,
            time.gathers,
            time.hop1 * seconds_per_byte,
            time.hop2 * seconds_per_byte,
            time.refresh * seconds_per_byte,
        )
        for compute, time in zip(computing, times, strict=True)
    ]


def leaving(rungs: Rungs, level: int, per_node: int) -> float:
    """The share of what a rank sends in a step that goes to other nodes: all or nothing, unless the ladder is flat."""
    others = [peer for peer in rungs.members(0, level) if peer]
    return sum(peer >= per_node for peer in others) / len(others)


def _levels(rungs: Rungs) -> range:
    return rungs.levels(1, rungs.degrees[-1])


def _unit_time(alone: Formula, shares: Mapping[str, float], micro_steps: int) -> UnitTime:
    """In bytes of a rank that leave its node, rather than seconds."""
    traffic = alone.step(micro_steps)

    def sent(*actions: str) -> float:
        return sum(moved.bytes * shares[level] for (action, level), moved in traffic.items() if action in actions)

    gathers = max((moved.calls for (action, _), moved in traffic.items() if action == "gather"), default=0)
    return UnitTime(
        gather=sent("gather") / max(gathers, 1),
        gathers=gathers,
        hop1=sent("hop 1") / micro_steps,
        hop2=sent("hop 2", "sync"),
        refresh=sent("refresh"),
    )


def bytes_leaving(formula: Formula, per_node: int, micro_steps: int, *, marked: bool = True) -> float:
    """What the formula says that a node sends to others in a step."""
    shares = {formula.rungs.name(level): leaving(formula.rungs, level, per_node) for level in _levels(formula.rungs)}
    traffic: Mapping[tuple[str, str], Traffic] = formula.step(micro_steps, marked=marked)
    return per_node * sum(moved.bytes * shares[level] for (_, level), moved in traffic.items())
