"""Where ranks are, which rungs a sharding has, and which piece of a state a rank holds. Integers only.

A rank is written in mixed radix over the rungs, the lowest rung first: with 2 ranks a node and the rungs 1, 2, 4, 8,
rank 6 is on local 0 of node 3 and has the digits (0, 1, 1). Ranks whose digits differ in one place only share a process
group there. A piece's number at a degree reads the same digits with the lowest rung *most* significant, so that going
down a rung, the pieces of a group lie side by side in the order of its ranks: every gather ends in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from mics_core.errors import ConfigError
from mics_core.spec.sharding import Sharding


class Scope(Enum):
    """What a level, the way between two neighbouring rungs, crosses."""

    INTRA = "inside nodes"
    INTER = "between nodes"


@dataclass(frozen=True)
class Topology:
    """So many ranks on nodes of so many, numbered node by node."""

    world: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        counts = type(self.ranks_per_node) is int and self.ranks_per_node >= 1 and self.world >= 1
        if not counts or (self.world % min(self.ranks_per_node, self.world)):
            raise ConfigError(
                f"ranks_per_node is {self.ranks_per_node!r}, expected a divisor of the {self.world} ranks: use whole "
                "nodes of one size"
            )


@dataclass(frozen=True)
class Rungs:
    """The degrees of a ladder, from 1 to the number of ranks, each dividing the next; a node is one of them."""

    degrees: tuple[int, ...]
    topology: Topology

    @classmethod
    def of(cls, sharding: Sharding, topology: Topology) -> Rungs:
        """The rungs that a resolved sharding needs."""
        node = min(topology.ranks_per_node, topology.world)
        for name in ("params", "grads", "optimizer"):
            degree = getattr(sharding, name)
            if degree % node and node % degree:
                raise ConfigError(
                    f"Sharding: {name} is {degree}, which neither divides nor is a multiple of the {node} ranks of a "
                    "node: a copy must fill whole nodes or share one evenly"
                )
        wanted = {1, node, sharding.params, sharding.grads, sharding.optimizer, topology.world}
        return cls(tuple(sorted(wanted)), topology)

    def levels(self, low: int, high: int) -> range:
        """The numbers of the levels between two degrees, upwards; level i leads from degrees[i] to degrees[i + 1]."""
        return range(self.degrees.index(low), self.degrees.index(high))

    def legs(self, low: int, high: int) -> list[tuple[int, int]]:
        """The way between two degrees, upwards, cut in two where it leaves the nodes."""
        node = min(self.topology.ranks_per_node, self.topology.world)
        return [(low, node), (node, high)] if low < node < high else [(low, high)]

    def digits(self, rank: int) -> tuple[int, ...]:
        """The rank in mixed radix, one digit a level."""
        return tuple(rank // low % (high // low) for low, high in zip(self.degrees, self.degrees[1:], strict=False))

    def piece_number(self, rank: int, degree: int) -> int:
        """The number of the piece that a rank holds of a state cut into `degree` pieces."""
        number = 0
        for level, digit in zip(self.levels(1, degree), self.digits(rank), strict=False):
            number = number * (self.degrees[level + 1] // self.degrees[level]) + digit
        return number

    def members(self, rank: int, level: int) -> tuple[int, ...]:
        """The ranks that a rank meets on a level, in the order of their pieces."""
        low, high = self.degrees[level], self.degrees[level + 1]
        first = rank - self.digits(rank)[level] * low
        return tuple(range(first, first + high, low))

    def replicating(self, rank: int, degree: int) -> tuple[int, ...]:
        """The replication group: the ranks, one of each copy of a state, that hold the same of its `degree` pieces."""
        return tuple(range(rank % degree, self.topology.world, degree))

    def scope(self, level: int) -> Scope:
        """What a level crosses: a node is one of the rungs, so no level lies on both sides of it."""
        return Scope.INTRA if self.degrees[level + 1] <= self.topology.ranks_per_node else Scope.INTER

    def name(self, level: int) -> str:
        """What a level is called in messages and tables."""
        return f"{self.degrees[level]}-{self.degrees[level + 1]} {self.scope(level).value}"


def shardings(topology: Topology) -> Iterator[Sharding]:
    """All chains of degrees that share a node evenly or fill whole nodes, those that cut least first.

    Of two that cut parameters alike the optimizer's state is cut first: it adds nothing to what micro-steps send.
    """
    node, world = min(topology.ranks_per_node, topology.world), topology.world
    inside = [degree for degree in range(1, node + 1) if node % degree == 0]
    across = [degree for degree in range(2 * node, world + 1, node) if world % degree == 0]
    degrees = [*inside, *across]
    for p in degrees:
        for g in degrees:
            for o in degrees:
                if g % p == 0 and o % g == 0:
                    yield Sharding(p, g, o)
