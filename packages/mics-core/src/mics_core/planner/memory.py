"""The bytes that a rank holds at most in a step: what rests, gathered units, buffers, and what a pass holds."""

from __future__ import annotations

from dataclasses import dataclass

from mics_core.planner.candidate import Candidate
from mics_core.planner.cluster import Cluster, Transport
from mics_core.planner.workload import Workload
from mics_core.spec.formula import Formula
from mics_core.spec.topology import Rungs, Topology


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, as torch allocates them; what an allocator loses between them is left to the caller."""

    at_rest: int  # weights, master, gradients and the state of mics.AdamW
    gathered: int  # whole units: the root, the one in use and those ahead
    buffers: int  # for gradients on their way
    activations: int  # the most that a pass holds, a unit's gradients until they are packed included

    @property
    def total(self) -> int:
        """The peak."""
        return self.at_rest + self.gathered + self.buffers + self.activations

    def parts(self) -> str:
        """What the total adds up, in GB."""
        parts = (("at rest", self.at_rest), ("gathered", self.gathered), ("buffers", self.buffers))
        return ", ".join(f"{name} {count / 1e9:.2f}" for name, count in (*parts, ("activations", self.activations)))

    def __str__(self) -> str:
        return f"{self.total / 1e9:.2f} GB ({self.parts()})"


def memory(workload: Workload, candidate: Candidate, cluster: Cluster) -> Memory:
    """The predicted peak of a rank in the steady state, while a step's passes run."""
    formula = formula_of(workload, candidate, cluster)
    working = formula.working()
    if cluster.transport is Transport.NCCL:
        working.pop("received")  # it sums on the way
    return Memory(
        sum(formula.at_rest().values()),
        formula.gathered(candidate.prefetch_units),
        sum(working.values()),
        workload.live(candidate.micro_batch, recompute=candidate.recompute),
    )


def formula_of(workload: Workload, candidate: Candidate, cluster: Cluster) -> Formula:
    """What the runtime's formula says of the workload's units."""
    rungs = Rungs.of(candidate.sharding, Topology(cluster.ranks, candidate.ranks_per_node or cluster.ranks_per_node))
    sizes = tuple(unit.size for unit in workload.units)
    return Formula(candidate.sharding, candidate.precision, rungs, workload.root.size, sizes)
