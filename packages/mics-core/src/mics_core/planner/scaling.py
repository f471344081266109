"""Curves over nodes: the same work for every rank (weak) or for the whole cluster (strong), beside the peers.

points = curves(workload, cluster, candidate, [2, 4, 8, 16], Scaling.WEAK)
print(table(points))
draw(points, "weak.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from mics_core.errors import ConfigError
from mics_core.planner.candidate import Candidate, System
from mics_core.planner.cluster import Cluster
from mics_core.planner.simulator import Prediction, simulate
from mics_core.planner.timeline import new_figure
from mics_core.sharding import Sharding

if TYPE_CHECKING:
    from mics_core.planner.workload import Workload

SYSTEMS = (System.MICS, System.ZERO3, System.HSDP, System.DDP)
_COLOURS = {System.MICS: "#1b6ca8", System.ZERO3: "#d1495b", System.HSDP: "#e9b44c", System.DDP: "#9aa5b1"}


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
    """Predict every system on every number of nodes, as if memory were no limit: `memory` says what fits.

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
            prediction = simulate(workload, grown, peer(local, system, grown), system)
            each = local.micro_batch * local.micro_steps
            point = Point(system, count, grown.ranks, each * grown.ranks, prediction, 1.0)
            if first is None:
                first = point
            point = replace(point, kept=_rate(point) / _rate(first))
            points.append(point)
    return points


def table(points: Sequence[Point]) -> str:
    """Seconds, TFLOP/s and what is kept, a row for each point."""
    rows = [("", "nodes", "ranks", "samples", "s per step", "exposed", "TFLOP/s a rank", "kept")]
    for point in points:
        told = point.prediction
        rows.append(
            (
                point.system.value,
                str(point.nodes),
                str(point.ranks),
                str(point.samples),
                f"{told.seconds:.3f}",
                f"{100 * told.exposed / told.seconds:.1f} %",
                f"{told.tflops:.1f}",
                f"{100 * point.kept:.1f} %",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def draw(points: Sequence[Point], path: Path | str) -> None:
    """Draw how much of its speed each system keeps; needs matplotlib."""
    figure = new_figure(6, 3.6)
    axes = figure.add_subplot()
    for system in dict.fromkeys(point.system for point in points):
        mine = [point for point in points if point.system is system]
        ranks = [point.ranks for point in mine]
        speeds = [point.prediction.tflops for point in mine]
        axes.plot(ranks, speeds, marker="o", label=system.value, color=_COLOURS.get(system))
    axes.set_xscale("log", base=2)
    ticks = sorted({point.ranks for point in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("ranks")
    axes.set_ylabel("TFLOP/s of the model, a rank")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


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
