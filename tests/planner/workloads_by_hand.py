"""Workloads for the simulator's tests, written down instead of traced."""

from __future__ import annotations

import torch

from mics_core.planner.workload import UnitWork, Workload
from mics_core.spec.formula import UnitSize
from mics_core.spec.layout import Layout


def workload(
    blocks: int, elements: int, flops: float, ranks: int, root: tuple[int, float] = (0, 0.0), tokens: int = 1
) -> Workload:
    """Equal blocks of so many elements and forward FLOPs of a sample, and a root of (elements, FLOPs)."""

    def unit(name: str, count: int, forward: float) -> UnitWork:
        size = Layout.plan([("weight", (count,))], ranks).size if count else 0
        return UnitWork(name, UnitSize(size, 0), forward, 0, 0, 0)

    units = tuple(unit(f"block {number}", elements, flops) for number in range(blocks))
    return Workload(
        root=unit("root", *root),
        units=units,
        parameters=blocks * elements + root[0],
        flops_per_sample=3 * (blocks * flops + root[1]),
        tokens_per_sample=tokens,
        compute=torch.bfloat16,
    )
