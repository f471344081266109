"""A step of the real runtime, written down: on a stand-in model of the workload's unit sizes, which has no memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mics_core.comm.recorded import Entry, Kind, Program, RecordedWorld
from mics_core.loop import accumulate, clip_grad_norm_
from mics_core.optim.adamw import AdamW
from mics_core.planner.candidate import Candidate
from mics_core.planner.cluster import Cluster, Transport
from mics_core.runtime import shard
from mics_core.spec.formula import UnitSize
from mics_core.spec.sharding import Precision, Sharding

if TYPE_CHECKING:
    from mics_core.planner.workload import Workload

META = torch.device("meta")
FORWARD, BACKWARD, END = "forward", "backward", "end"


@dataclass(frozen=True)
class Recorded:
    """What decides which steps are recorded."""

    sizes: tuple[UnitSize, ...]  # the root's first
    sharding: Sharding
    precision: Precision
    prefetch_units: int
    ranks: int
    ranks_per_node: int
    sums: bool  # as of `RecordedWorld`

    @classmethod
    def of(cls, workload: Workload, candidate: Candidate, cluster: Cluster) -> Recorded:
        """What a recording depends on: a cluster's links and speed do not change it."""
        return cls(
            tuple(unit.size for unit in (workload.root, *workload.units)),
            candidate.sharding,
            replace(candidate.precision, loss_scale=None),
            candidate.prefetch_units,
            cluster.ranks,
            candidate.ranks_per_node or cluster.ranks_per_node,
            cluster.transport is not Transport.GLOO,
        )


@lru_cache(maxsize=32)
def record(recorded: Recorded, micro_steps: int) -> list[list[Entry]]:
    """Two steps in a row, the second one in the steady state.

    A unit's computation is an entry named `forward NUMBER` or `backward NUMBER`, the root's number is 0; `end` follows
    every backward and the step.
    """
    world = RecordedWorld(recorded.ranks, device=META, sums=recorded.sums)
    program = world.program
    model = _StandIn(program, recorded.sizes, recorded.precision)
    largest = max(size.trained + size.frozen for size in recorded.sizes) * recorded.precision.compute.itemsize
    with torch.enable_grad():
        shard(
            model,
            recorded.sharding,
            units=[_UnitStandIn],
            precision=recorded.precision,
            ranks_per_node=recorded.ranks_per_node,
            group=world,
            prefetch_bytes=recorded.prefetch_units * largest,
        )
        optimizer = AdamW(model.parameters())
        begins = []
        for count in (2, micro_steps) if micro_steps > 1 else (1, 1, 1):  # the first pass finds the order of units
            begins.append(len(program.entries))
            for batch in accumulate(model, [torch.ones(1, requires_grad=True)] * count):
                model(batch).backward()
                program.add(Kind.COMPUTE, END)
            clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            program.add(Kind.COMPUTE, END)
    *_, before, last = pairwise([*begins, len(program.entries)])
    return [program.entries[begin:end] for begin, end in (before, last)]


class _Compute(torch.autograd.Function):
    """A unit's arithmetic, of which only the moment matters."""

    @staticmethod
    def forward(ctx: Any, program: Program, number: int, x: Tensor, *weights: Tensor) -> Tensor:
        program.add(Kind.COMPUTE, f"{FORWARD} {number}")
        ctx.program, ctx.number = program, number
        ctx.needed = [weight.requires_grad for weight in weights]
        ctx.save_for_backward(*weights)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.program.add(Kind.COMPUTE, f"{BACKWARD} {ctx.number}")
        grads = [
            torch.empty_like(weight) if needed else None
            for weight, needed in zip(ctx.saved_tensors, ctx.needed, strict=True)
        ]
        return None, None, grad, *grads


class _UnitStandIn(nn.Module):
    """Parameters of so many elements."""

    def __init__(self, program: Program, number: int, size: UnitSize, exact: int) -> None:
        super().__init__()
        self._program, self._number = program, number
        # What has two dimensions may travel in eight bits.
        shapes = {"matrix": (1, size.trained - exact), "vector": (exact,), "frozen": (size.frozen,)}
        for name, shape in shapes.items():
            if shape[-1]:
                weight = nn.Parameter(torch.empty(shape, device=META), requires_grad=name != "frozen")
                self.register_parameter(name, weight)

    def forward(self, x: Tensor) -> Tensor:
        weights = [getattr(self, name) for name in self._parameters]
        result: Tensor = _Compute.apply(self._program, self._number, x, *weights)  # type: ignore[no-untyped-call]
        return result

    def reset_parameters(self) -> None:
        """Nothing to fill."""


class _StandIn(_UnitStandIn):
    """Units one after another, the root around them."""

    def __init__(self, program: Program, sizes: Sequence[UnitSize], precision: Precision) -> None:
        root, *units = [(size, size.exact if precision.has_eight_bits else 0) for size in sizes]
        super().__init__(program, 0, *root)
        self.units = nn.ModuleList(_UnitStandIn(program, number, *unit) for number, unit in enumerate(units, 1))

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x)
        return super().forward(x)
