"""What eight bits between nodes would bring to a plan."""

from __future__ import annotations

from dataclasses import replace

import torch

from mics_core.planner.candidate import Candidate
from mics_core.planner.cluster import Cluster
from mics_core.planner.columns import digits, duration
from mics_core.planner.memory import formula_of
from mics_core.planner.simulator import simulate
from mics_core.planner.ways import Row
from mics_core.planner.workload import Workload
from mics_core.spec.topology import Scope


def weigh(workload: Workload, chosen: Row, cluster: Cluster) -> str:
    """The bytes and the time of the same way to train with them; nothing where they would change nothing."""
    precision = chosen.candidate.precision
    if precision.between_nodes is not None or torch.float64 in (precision.compute, precision.reduce, precision.master):
        return ""
    other = replace(chosen.candidate, precision=replace(precision, between_nodes=torch.int8))
    exact, fewer = (_between_nodes(workload, candidate, cluster) for candidate in (chosen.candidate, other))
    if fewer == exact:
        return ""
    seconds = simulate(workload, cluster, other).seconds
    return (
        f"between_nodes=torch.int8 would send {digits(fewer / 1e6)} of {digits(exact / 1e6)} MB a rank between nodes, "
        f"and take {duration(seconds)}; it rounds sums of gradients"
    )


def _between_nodes(workload: Workload, candidate: Candidate, cluster: Cluster) -> int:
    """Bytes that a rank sends there in a step."""
    formula = formula_of(workload, candidate, cluster)
    rungs = formula.rungs
    levels = {rungs.name(level) for level in rungs.levels(1, rungs.degrees[-1]) if rungs.scope(level) is Scope.INTER}
    step = formula.step(candidate.micro_steps)
    return sum(traffic.bytes for (_, level), traffic in step.items() if level in levels)
