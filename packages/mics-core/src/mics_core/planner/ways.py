"""Ways to train that a plan looked at: which of those that are as fast it prefers, and why each other one lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mics_core.planner.candidate import Candidate
from mics_core.planner.cluster import Cluster
from mics_core.planner.columns import degrees, digits, gigabytes
from mics_core.planner.memory import Memory
from mics_core.planner.simulator import Prediction
from mics_core.spec.sharding import Sharding

AS_FAST = 1.01
"""Of ways whose steps take at most so many times as long as the fastest's, the one that is preferred is chosen."""

HEADROOM = 1.05
"""A way fits with room to spare if so many times its memory would fit: the prediction is within 5 %."""


@dataclass(frozen=True)
class Row:
    """A way to train that fits, and what it takes."""

    candidate: Candidate
    prediction: Prediction
    memory: Memory


@dataclass(frozen=True)
class Loser:
    """A way to train that was not chosen, and why."""

    candidate: Candidate
    memory: Memory
    why: str  # with {} in place of the figure
    figure: str = ""
    order: float = 0.0  # of figures
    seconds: float | None = None  # of a step, at least; None if it does not fit

    @property
    def reason(self) -> str:
        """In a clause."""
        return self.why.format(self.figure)


def preference(candidate: Candidate, held: Memory, cluster: Cluster) -> tuple[bool, bool, int, bool, int, int]:
    """To sort ways that are as fast: room to spare, then whole nodes, then what cuts least."""
    cut = candidate.sharding
    return (
        is_tight(held, cluster),
        splits_nodes(cut, cluster),
        cut.params,
        candidate.recompute,
        cut.grads,
        cut.optimizer,
    )


def is_tight(held: Memory, cluster: Cluster) -> bool:
    """Whether it may not fit, by as much as the prediction may be wrong."""
    return HEADROOM * held.total > cluster.memory


def splits_nodes(sharding: Sharding, cluster: Cluster) -> bool:
    """Whether a state is cut over a part of a node."""
    return any(1 < degree < cluster.ranks_per_node for degree in (sharding.params, sharding.grads, sharding.optimizer))


def too_large(candidate: Candidate, held: Memory, cluster: Cluster) -> Loser:
    """One that does not fit, however small its micro-batch is."""
    why = f"does not fit: {{}} of {gigabytes(cluster.memory)} GB"
    return Loser(candidate, held, why, gigabytes(held.total), held.total)


def loser(
    candidate: Candidate, held: Memory, winner: Row, cluster: Cluster, seconds: float, *, least: bool = False
) -> Loser:
    """One that takes so many seconds; `least` if these are only the least it takes."""
    times = seconds / winner.prediction.seconds
    if times > AS_FAST:
        why = f"slower: {{}}x, {_cause(candidate, winner.candidate, cluster)}"
        figure = f"{'at least ' if least else ''}{times:.2f}"
        return Loser(candidate, held, why, figure, times, seconds)
    why = "not simulated: others are estimated as fast or faster" if least else _tie(candidate, held, winner, cluster)
    return Loser(candidate, held, why, seconds=seconds)


def _tie(candidate: Candidate, held: Memory, winner: Row, cluster: Cluster) -> str:
    chosen = winner.candidate
    if is_tight(held, cluster) and not is_tight(winner.memory, cluster):
        return "as fast within 1 %, and leaves less than 5 % of the memory free"
    if splits_nodes(candidate.sharding, cluster) and not splits_nodes(chosen.sharding, cluster):
        return "as fast within 1 %, and splits nodes"
    if _cuts_more(candidate, chosen):
        return "as fast within 1 %, and cuts more"
    if candidate.recompute and not chosen.recompute:
        return "as fast within 1 %, and recomputes"
    return "cuts less, and is more than 1 % behind the fastest"


def summed_up(losers: Sequence[Loser]) -> list[tuple[str, str]]:
    """A row for each reason: how many shardings it holds for, between which degrees, and between which figures."""
    groups: dict[str, list[Loser]] = {}
    for each in losers:
        groups.setdefault(each.why, []).append(each)
    rows = []
    for why, group in groups.items():
        low, high = min(group, key=lambda each: each.order), max(group, key=lambda each: each.order)
        span = low.figure if low.figure == high.figure else f"{low.figure} to {high.figure.removeprefix('at least ')}"
        rows.append((f"{len(group):>{len(digits(len(losers)))}}  {_between(group)}", why.format(span)))
    return rows


def _between(group: Sequence[Loser]) -> str:
    cuts = [each.candidate.sharding for each in group]
    least, most = (
        Sharding(*(pick(getattr(cut, name) for cut in cuts) for name in ("params", "grads", "optimizer")))
        for pick in (min, max)
    )
    if least == most:
        return degrees(least)
    pairs = zip(degrees(least).split(", "), degrees(most).split(", "), strict=True)
    return ", ".join(low if low == high else f"{low}-{high}" for low, high in pairs)


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
