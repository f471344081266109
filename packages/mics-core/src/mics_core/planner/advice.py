"""A plan in words: what to do, and what would be large enough."""

from __future__ import annotations

from collections.abc import Sequence

from mics_core.planner.candidate import Candidate
from mics_core.planner.cluster import Cluster
from mics_core.planner.columns import degrees
from mics_core.planner.memory import memory
from mics_core.planner.ways import Row
from mics_core.planner.workload import Workload
from mics_core.spec.sharding import Precision, Sharding

MOST_NODES = 65536
"""Clusters up to this many nodes are looked at for one that would be large enough."""


def advise(rows: Sequence[Row], cluster: Cluster) -> str:
    """What to do, in a sentence."""
    sharding, ranks = rows[0].candidate.sharding, cluster.ranks
    call = f"Sharding({degrees(sharding)})"
    known = {Sharding(1, 1, ranks): "ZeRO-1", Sharding(1, ranks, ranks): "ZeRO-2"}
    named = f", which is {known[sharding]}" if sharding in known and ranks > 1 else ""
    best = "nothing that fits is more than 1 % faster"
    if sharding == Sharding(1, 1, 1):
        return f"Sharding is not needed: {call}, which is DDP, fits, and {best}."
    if sharding.optimizer <= cluster.ranks_per_node < ranks:
        return f"Sharding beyond the node is not needed: use {call}{named}; {best}."
    if sharding.params == 1:
        return f"Use {call}{named}: every rank keeps whole parameters, and {best}."
    if sharding.params == ranks:
        return f"Use {call}: everything is cut over all ranks, as ZeRO-3 does, and gathered by the ladder."
    return f"Use {call}: one copy of the parameters lies on {sharding.params} ranks."


def cluster_that_fits(workload: Workload, cluster: Cluster, precision: Precision, recomputes: Sequence[bool]) -> str:
    """The sentence for a model that is too large: the least that would do."""

    def needed(nodes: int) -> int:
        larger = cluster.with_nodes(nodes)
        whole = Sharding.zero3().resolve(larger.ranks)
        return min(
            memory(workload, Candidate(whole, precision, 1, 1, recompute, prefetch_units=0), larger).total
            for recompute in recomputes
        )

    least = needed(cluster.nodes)
    said = (
        f"plan: the model needs at least {least / 1e9:.1f} GB a rank on {cluster.nodes} nodes of {cluster.name}, which "
        f"have {cluster.memory / 1e9:.1f} GB a rank"
    )
    low, high = cluster.nodes, 2 * cluster.nodes
    while needed(high) > cluster.memory:
        low, high = high, 2 * high
        if high > MOST_NODES:
            return (
                f"{said}, and {needed(low) / 1e9:.1f} GB on {low} of them: use ranks with more memory, a smaller "
                "sample, or smaller units"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if needed(middle) <= cluster.memory else (middle, high)
    return f"{said}: use at least {high} nodes, or ranks with that much memory"
