"""How long a step takes, and what of it the computation stands still: the schedules played on a cluster's numbers.

All ranks do the same at the same time, so one stands for all: 16,384 ranks cost what 8 do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mics_core.errors import ConfigError
from mics_core.planner.candidate import Candidate, System
from mics_core.planner.cluster import Cluster
from mics_core.planner.collectives import Collectives
from mics_core.planner.engine import COMPUTE, Task, TaskGraph
from mics_core.planner.peers import DDP, FSDP2, HSDP, ZeRO3
from mics_core.planner.playing import Mics

if TYPE_CHECKING:
    from mics_core.planner.workload import Workload

_SCHEDULES: Mapping[System, type[Mics | DDP | FSDP2]] = {
    System.MICS: Mics,
    System.DDP: DDP,
    System.HSDP: HSDP,
    System.FSDP2: FSDP2,
    System.ZERO3: ZeRO3,
}
_PLAYED = 4
"""Micro-steps of a step that are played one by one; of more, those in the middle are all like the third."""


@dataclass(frozen=True)
class Event:
    """Work in a lane, in seconds from the beginning of the step."""

    lane: str
    name: str
    begin: float
    end: float


@dataclass(frozen=True)
class Prediction:
    """An optimizer step in the steady state."""

    seconds: float
    compute: float  # seconds in which the computation's lane worked
    exposed: float  # seconds that it stood still for links
    tflops: float  # of the model, per rank: without what is computed again
    performed: float  # the same with it, as published figures often count
    events: tuple[Event, ...] = field(repr=False)  # of a step with at most 4 micro-steps; thousands


def simulate(workload: Workload, cluster: Cluster, candidate: Candidate, system: System = System.MICS) -> Prediction:
    """Predict the steady state: the last of three steps in a row."""
    played = min(candidate.micro_steps, _PLAYED)
    graph = TaskGraph()
    marks, _ = _play(graph, workload, cluster, candidate, system, [played] * 3)
    begin, end = marks[1][-1].end, marks[2][-1].end
    step = [task for task in graph.tasks if task.end > begin and task.begin < end]
    compute = sum(task.end - task.begin for task in step if task.lane == COMPUTE)
    seconds = end - begin
    if candidate.micro_steps > played:
        earlier, later = marks[2][1], marks[2][2]
        middle = later.end - earlier.end
        computing = sum(
            task.end - task.begin for task in step if task.lane == COMPUTE and earlier.end <= task.begin < later.end
        )
        repeated = candidate.micro_steps - played
        seconds, compute = seconds + repeated * middle, compute + repeated * computing
    samples = candidate.micro_batch * candidate.micro_steps
    tflops = workload.flops_per_sample * samples / seconds / 1e12
    again = sum(unit.forward_flops for unit in workload.units) if candidate.recompute else 0.0
    performed = (workload.flops_per_sample + again) * samples / seconds / 1e12
    events = tuple(
        Event(task.lane, task.name, task.begin - begin, task.end - begin) for task in step if task.end > task.begin
    )
    return Prediction(seconds, compute, max(seconds - compute, 0.0), tflops, performed, events)


def mean_seconds(
    workload: Workload, cluster: Cluster, candidate: Candidate, system: System = System.MICS, steps: int = 1
) -> float:
    """Seconds of a step, the mean of so many from a standstill to the end of all that they start, as benchmarks time
    them.
    """
    graph = TaskGraph()
    _, end = _play(graph, workload, cluster, candidate, system, [candidate.micro_steps] * steps)
    return end / steps


def _play(
    graph: TaskGraph,
    workload: Workload,
    cluster: Cluster,
    candidate: Candidate,
    system: System,
    steps: Sequence[int],
) -> tuple[list[list[Task]], float]:
    sharding = candidate.sharding.resolve(cluster.ranks)
    if sharding != candidate.sharding:
        raise ConfigError(
            f"simulate: the sharding is {candidate.sharding}, expected three degrees: call its resolve({cluster.ranks})"
        )
    schedule = _SCHEDULES[system](graph, workload, Collectives(cluster), candidate)
    marks = [schedule.step(micro_steps) for micro_steps in steps]
    return marks, graph.run()
