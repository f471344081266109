"""How long a unit's computation takes, and what the runtime does in a rank's own memory around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mics_core.errors import ConfigError
from mics_core.planner.candidate import Candidate, System
from mics_core.planner.cluster import Cluster
from mics_core.spec.sharding import Precision

if TYPE_CHECKING:
    from mics_core.planner.workload import UnitWork

_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_ADAM = 28
"""Bytes that an update moves for each element: master and two moments read and written, a gradient read."""


@dataclass(frozen=True)
class Work:
    """Seconds of one unit in a micro-step."""

    forward: float
    backward: float  # with recomputation, where the candidate asks for it
    host: float  # that the computation waits for the host, in each direction


def peak(cluster: Cluster, precision: Precision) -> float:
    """FLOP/s of a rank's matrix products in the dtype of the work."""
    name = _NAMES.get(precision.compute, str(precision.compute))
    if name not in cluster.flops:
        raise ConfigError(
            f"cluster: {cluster.name} has no flops.{name}, which the precision computes in, only "
            f"{', '.join(cluster.flops)}: add it to the cluster's file, or choose another precision"
        )
    return cluster.flops[name]


class Arithmetic:
    """Seconds of computation, by a candidate on a cluster."""

    def __init__(self, cluster: Cluster, candidate: Candidate, system: System) -> None:
        self._candidate = candidate
        self._bandwidth = cluster.memory_bandwidth
        self.host = cluster.host.get(system.value, 0.0) / 2
        self._speed = peak(cluster, candidate.precision) * cluster.efficiency

    def unit(self, unit: UnitWork, *, root: bool = False) -> Work:
        """Forward and backward; never faster than memory brings the weights."""
        precision = self._candidate.precision
        weights = (unit.size.trained + unit.size.frozen) * precision.compute.itemsize
        forward = max(unit.forward_flops * self._candidate.micro_batch / self._speed, weights / self._bandwidth)
        # What only passes on gradients of its inputs has one product in its backward, not two.
        products = 2 if unit.size.trained else 1
        again = 1 if self._candidate.recompute and not root else 0
        return Work(forward, (products + again) * forward, 0.0 if not weights else self.host)

    def pack(self, elements: int, *, travels: bool, first: bool) -> float:
        """Gradients into the buffer that they travel from, or onto their sum where they do not."""
        precision = self._candidate.precision
        compute, master = precision.compute.itemsize, precision.master.itemsize
        if travels:
            return self.memory(elements * (compute + precision.reduce.itemsize))
        return self.memory(elements * (compute + master * (1 if first else 2)))

    def norm(self, elements: int) -> float:
        """The sum of squares of gradients."""
        return self.memory(elements * self._candidate.precision.master.itemsize)

    def update(self, elements: int) -> float:
        """AdamW, with the rounded weights written where they differ."""
        precision = self._candidate.precision
        rounded = 0 if precision.master == precision.compute else precision.compute.itemsize
        return self.memory(elements * (_ADAM + rounded))

    def memory(self, count: float) -> float:
        """Seconds to read and write so many bytes, together."""
        return count / self._bandwidth
