"""A plan in words: why a sharding lost, which one needs no MiCS, and what would be large enough."""

from __future__ import annotations

from collections.abc import Sequence

from mics_core.planner.candidate import Candidate
from mics_core.planner.cluster import Cluster
from mics_core.planner.memory import memory
from mics_core.planner.plan_table import Row
from mics_core.planner.workload import Workload
from mics_core.sharding import Precision, Sharding

MOST_NODES = 65536
"""Clusters up to this many nodes are looked at for one that would be large enough."""


def reason(candidate: Candidate, winner: Row, cluster: Cluster, seconds: float, *, least: bool = False) -> str:
    """Why a candidate that takes so many seconds was not chosen; `least` if these are only the least it takes."""
    chosen, times = winner.candidate, seconds / winner.prediction.seconds
    if times > 1.01:
        return f"slower: {'at least ' if least else ''}{times:.2f}x, {_cause(candidate, chosen, cluster)}"
    if _cuts_more(candidate, chosen):
        return "it cuts more, and is no faster" if least else "it cuts more, and is as fast within 1 %"
    if least:
        return "not simulated: it sends more"
    if candidate.recompute and not chosen.recompute:
        return "as fast within 1 %, and recomputes"
    return f"cuts less, and more than 1 % behind the fastest: {times:.3f}x of this"


def _cuts_more(candidate: Candidate, chosen: Candidate) -> bool:
    mine, theirs = candidate.sharding, chosen.sharding
    return (mine.params, mine.grads, mine.optimizer) > (theirs.params, theirs.grads, theirs.optimizer)


def _cause(candidate: Candidate, chosen: Candidate, cluster: Cluster) -> str:
    node, mine, theirs = cluster.ranks_per_node, candidate.sharding, chosen.sharding
    if mine.params > node and mine.params > theirs.params:
        return "its gathers cross nodes in every micro-step"
    if mine.grads > node and mine.grads > theirs.grads:
        return "its gradients cross nodes in every micro-step"
    if candidate.recompute and not chosen.recompute:
        return "it fits only if forwards are computed twice"
    if candidate.micro_steps > chosen.micro_steps:
        return f"its memory leaves room for micro-batches of {candidate.micro_batch} alone"
    if mine.params > theirs.params:
        return "it gathers more inside nodes"
    return "more of its transfers stay uncovered"


def advise(rows: Sequence[Row], cluster: Cluster) -> str:
    """What to do, in a sentence."""
    sharding = rows[0].candidate.sharding
    degrees = f"({sharding.params}, {sharding.grads}, {sharding.optimizer})"
    if sharding == Sharding(1, 1, 1):
        return "Do not use MiCS: DDP fits, and nothing is more than 1 % faster."
    if sharding.params == 1:
        name = "ZeRO-1" if sharding.grads == 1 else "ZeRO-2"
        over = "" if sharding.optimizer == cluster.ranks else f" over {sharding.optimizer} ranks, {degrees},"
        return f"Do not use MiCS: {name}{over} fits, and nothing is more than 1 % faster."
    if sharding.params == cluster.ranks:
        return "Cut everything over all ranks, as ZeRO-3 does, with gathers by the ladder."
    return f"Use Sharding{degrees}: one copy of the parameters lies on {sharding.params} ranks."


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
