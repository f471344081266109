"""Curves over nodes: the same work for every rank (weak) or for the whole cluster (strong), beside the peers.

points = curves(workload, cluster, candidate, [2, 4, 8, 16], Scaling.WEAK)
print(table(points))
curve_picture.draw(points, "weak.png", "gpt-100b on p4d.24xlarge")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from mics_core.errors import ConfigError
from mics_core.planner.candidate import Candidate, System
from mics_core.planner.cluster import Cluster
from mics_core.planner.columns import aligned, degrees, digits, gigabytes, unit_of
from mics_core.planner.memory import memory
from mics_core.planner.simulator import Prediction, simulate
from mics_core.spec.sharding import Sharding

if TYPE_CHECKING:
    from mics_core.planner.workload import Workload

SYSTEMS = (System.MICS, System.ZERO3, System.HSDP, System.DDP)


class Scaling(Enum):
    """What stays the same as nodes are added."""

    WEAK = "weak"  # the work of a rank
    STRONG = "strong"  # the work of all ranks together


@dataclass(frozen=True)
class Point:
    """A system on so many nodes."""

    system: System
    nodes: int
    ranks: int
    samples: int  # of all ranks in a step
    prediction: Prediction
    kept: float  # of the samples a second and rank on the fewest nodes
    sharding: Sharding  # that was played
    memory: int  # bytes of a rank that it needs, counted as if mics ran these degrees
    available: int  # bytes that a rank has

    @property
    def fits(self) -> bool:
        """Whether it could run at all."""
        return self.memory <= self.available


def peer(candidate: Candidate, system: System, cluster: Cluster) -> Candidate:
    """The candidate as this system would run it: HSDP in groups of a node, FSDP2 and ZeRO-3 over all ranks."""
    if system is System.MICS:
        return candidate
    node = min(cluster.ranks_per_node, cluster.ranks)
    degree = {System.DDP: 1, System.HSDP: node}.get(system, cluster.ranks)
    return replace(candidate, sharding=Sharding(degree, degree, degree), ranks_per_node=None)


def curves(
    workload: Workload,
    cluster: Cluster,
    candidate: Candidate,
    nodes: Sequence[int],
    scaling: Scaling = Scaling.WEAK,
    systems: Sequence[System] = SYSTEMS,
) -> list[Point]:
    """Predict every system on every number of nodes, what does not fit, too: `Point.fits` says so.

    The candidate is meant for the fewest nodes. `WORLD` (-1) in its sharding stands for all ranks of each cluster. With
    strong scaling it takes fewer micro-steps on more nodes, and then smaller micro-batches.
    """
    if not nodes or list(nodes) != sorted(set(nodes)):
        raise ConfigError(f"simulate: the nodes are {list(nodes)}, expected some in increasing order: such as 2, 4, 8")
    points: list[Point] = []
    for system in systems:
        first: Point | None = None
        for count in nodes:
            grown = cluster.with_nodes(count)
            local = candidate if scaling is Scaling.WEAK else _shared(candidate, nodes[0], count)
            try:
                local = replace(local, sharding=local.sharding.resolve(grown.ranks))
            except ConfigError as error:
                raise ConfigError(f"simulate: on {count} nodes: {error}, or numbers of nodes that it fits") from error
            played = peer(local, system, grown)
            prediction = simulate(workload, grown, played, system)
            samples = local.micro_batch * local.micro_steps * grown.ranks
            needed = memory(workload, played, grown).total
            point = Point(system, count, grown.ranks, samples, prediction, 1.0, played.sharding, needed, grown.memory)
            if first is None:
                first = point
            point = replace(point, kept=_rate(point) / _rate(first))
            points.append(point)
    return points


def table(points: Sequence[Point]) -> str:
    """What was played, how fast it is and whether it fits, a row for each point."""
    unit, many = unit_of(point.prediction.seconds for point in points)
    there = f"GB of {gigabytes(points[0].available)}"
    rows = [("", "P, G, O", "nodes", f"{unit}/step", "exposed", "TFLOP/s", "kept", there, "fits")]
    for point in points:
        told = point.prediction
        rows.append(
            (
                point.system.value,
                degrees(point.sharding),
                str(point.nodes),
                digits(many * told.seconds),
                f"{100 * told.exposed / told.seconds:.1f} %",
                f"{told.tflops:.1f}",
                f"{100 * point.kept:.1f} %",
                gigabytes(point.memory),
                "yes" if point.fits else "NO",
            )
        )
    return aligned(rows, (0, 1, 8))


def _shared(candidate: Candidate, fewest: int, nodes: int) -> Candidate:
    """The candidate's part of the same batch on more nodes."""
    each, left = divmod(candidate.micro_batch * candidate.micro_steps * fewest, nodes)
    if left or not each:
        raise ConfigError(
            f"simulate: {candidate.micro_batch * candidate.micro_steps} samples of a rank on {fewest} nodes cannot be "
            f"shared evenly on {nodes}: choose a larger batch, or nodes that are multiples of each other"
        )
    micro_batch = max(size for size in range(1, min(candidate.micro_batch, each) + 1) if each % size == 0)
    return replace(candidate, micro_batch=micro_batch, micro_steps=each // micro_batch)


def _rate(point: Point) -> float:
    return point.samples / point.ranks / point.prediction.seconds
