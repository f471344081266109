"""The planner's sums against its simulation: they sort ways rightly, and never promise less than a step takes."""

from dataclasses import replace
from itertools import product

import pytest

import workloads_by_hand
from depth import is_deep
from mics_core import Cluster, Precision
from mics_core.planner import Candidate, simulate
from mics_core.planner.cluster import Transport
from mics_core.planner.estimate import Estimates
from mics_core.spec.formula import UnitSize
from mics_core.spec.topology import Topology, shardings

BF16 = Precision.bf16()


@pytest.mark.parametrize("transport", Transport)
@pytest.mark.parametrize("gigabytes", [2, 20])
def test_estimates_are_near_the_simulation_and_the_least_is_never_above_it(
    transport: Transport, gigabytes: int
) -> None:
    plain = workloads_by_hand.workload(8, 200_000_000, 2e12, 8, root=(100_000_000, 1e12))
    frozen = replace(plain.units[0], size=UnitSize(20_000_000, 180_000_000))
    model = replace(plain, units=(*plain.units[:6], frozen, frozen))
    cluster = replace(Cluster.preset("DGX-H100", 4), ranks_per_node=2, transport=transport)
    rows = ((1e5, 1e-4), (1e9, 0.6 / gigabytes))  # measured, and slower than the bandwidth says
    links = {("gather", 2): rows, ("reduce", 2): rows}
    cluster = replace(cluster, inter=replace(cluster.inter, bandwidth=gigabytes * 1e9, tables=links))
    estimates = Estimates(model, cluster)
    chosen = list(shardings(Topology(8, 2)))[:: 1 if is_deep() else 6]
    for sharding, recompute, micro_steps, ahead in product(chosen, (False, True), (1, 2, 6), (0, 1)):
        candidate = Candidate(sharding, BF16, 2, micro_steps, recompute, prefetch_units=ahead)
        told, seconds = estimates.of(candidate), simulate(model, cluster, candidate).seconds
        assert told.least <= (1 + 1e-9) * seconds, candidate
        assert 0.8 <= told.likely / seconds <= 1.2, candidate
