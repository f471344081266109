"""What one collective costs: how long it keeps a link busy, and how long its result takes beyond that.

All ranks do the same at the same time, so the ranks of a node share its link to the others: k channels side by side
take k times as long as one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, log2

from mics_core.planner.cluster import Cluster, Link, Table, Transport


@dataclass(frozen=True)
class Move:
    """Part of a job: `busy` seconds on a link, or on none, and so many more until its result is there."""

    link: str | None  # "intra", "inter", or None for work in the rank's own memory
    busy: float
    latency: float = 0.0


@dataclass(frozen=True)
class Ring:
    """A group of ranks that meet in one collective, in nodes of equally many."""

    ranks: int
    per_node: int  # of them

    @property
    def nodes(self) -> int:
        """On so many nodes."""
        return self.ranks // self.per_node


class Collectives:
    """The costs of a cluster's collectives.

    Tables between nodes are of groups with one rank on each node, those inside of groups on one: others go by formula.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._per_node = min(cluster.ranks_per_node, cluster.ranks)

    def memory(self, count: float) -> float:
        """Seconds to read and write so many bytes, together."""
        return count / self.cluster.memory_bandwidth

    def contiguous(self, ranks: int) -> Ring:
        """Neighbouring ranks: those that hold one copy of a state."""
        return Ring(ranks, min(ranks, self._per_node))

    def strided(self, degree: int) -> Ring:
        """The ranks that hold the same piece of a state of this degree."""
        ranks = self.cluster.ranks // degree
        return Ring(ranks, min(ranks, max(1, self._per_node // degree)))

    def send(self, collective: str, peers: Sequence[int], piece: float) -> Move:
        """A "gather", "reduce" or "swap" of rank 0 and its peers, in which each rank sends `piece` bytes to each other.

        Where the ladder was told of smaller nodes than there are, they may be inside and between nodes at once.
        """
        away = sum(peer >= self._per_node for peer in peers)
        count = (len(peers) - 1) * piece
        link = self.cluster.inter if away else self.cluster.intra
        place = "inter" if away else "intra"
        pairs = self.cluster.transport is Transport.GLOO  # talk at once; else a ring does
        rows = link.tables.get(("gather" if pairs and collective == "swap" else collective, len(peers)))
        if rows and away in (0, len(peers) - 1):
            return Move(place, interpolate(rows, count))
        at_once = pairs or collective == "swap"
        latency = link.latency if at_once else self._hops(self._around(peers))
        if away:
            return Move(place, self._per_node * away * piece / link.bandwidth, latency)
        return Move(place, count / link.bandwidth, latency)

    def ring(self, collective: str, ring: Ring, whole: float) -> Move:
        """A peer's "gather", "reduce" or "all-reduce" of a buffer of `whole` bytes, around its group."""
        if ring.ranks == 1:
            return Move(None, 0.0)
        place = "inter" if ring.nodes > 1 else "intra"
        link: Link = getattr(self.cluster, place)
        twice = collective == "all-reduce"
        if collective == "reduce" and self.cluster.transport is Transport.GLOO:
            collective, twice = "all-reduce", True  # and it keeps a part of the result
        count = (2 if twice else 1) * whole * (ring.ranks - 1) / ring.ranks
        rows = link.tables.get((collective, ring.ranks))
        if rows and ring.per_node in (1, ring.ranks):
            return Move(place, interpolate(rows, count))
        latency = (2 if twice else 1) * self._hops(ring)
        if self.cluster.transport is Transport.GLOO:
            latency /= 2  # gloo sends halves: while one is under way the other one is passed on
        elif twice:
            latency = min(latency, self._tree(ring))
        busy = count / self.cluster.intra.bandwidth
        if ring.nodes > 1:
            groups = self._per_node // ring.per_node
            busy = max(busy, groups * count / link.bandwidth)
        return Move(place, busy, latency)

    def asking(self) -> Move:
        """A few bytes from every host to every other: a round for each bit of their number, of which some rank crosses
        nodes in each.
        """
        link = self.cluster.inter if self.cluster.nodes > 1 else self.cluster.intra
        return Move(None, 0.0, (self.cluster.ranks - 1).bit_length() * link.latency)

    def _around(self, peers: Sequence[int]) -> Ring:
        nodes = len({peer // self._per_node for peer in peers})
        return Ring(len(peers), len(peers) // nodes)

    def _hops(self, ring: Ring) -> float:
        """The first byte passes all ranks but one; as many links as there are nodes lie between nodes."""
        between = ring.nodes if ring.nodes > 1 else 0
        share = between / ring.ranks
        each = share * self.cluster.inter.latency + (1 - share) * self.cluster.intra.latency
        return (ring.ranks - 1) * each

    def _tree(self, ring: Ring) -> float:
        """Up a binary tree of nodes and down again, with a chain inside each."""
        inside = (ring.per_node - 1) * self.cluster.intra.latency
        return 2 * (inside + ceil(log2(ring.nodes)) * self.cluster.inter.latency)


def interpolate(rows: Table, count: float) -> float:
    """Seconds by a measured table: on straight lines between its rows, and on the outer ones beyond them.

    Below the first row a transfer takes as long as that one, since latency rules there.
    """
    counts = [row[0] for row in rows]
    place = bisect_left(counts, count)
    if place == 0:
        return rows[0][1]
    if place == len(rows):
        if len(rows) == 1:
            return rows[0][1] * count / rows[0][0]
        place -= 1
    (x0, y0), (x1, y1) = list(pairwise(rows))[place - 1]
    return max(y0 + (count - x0) * (y1 - y0) / (x1 - x0), 0.0)
