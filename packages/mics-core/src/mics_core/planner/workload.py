"""What a model computes and keeps, found by running it on the meta device, where tensors have shapes and no memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mics_core import trees
from mics_core.errors import ConfigError
from mics_core.planner.passing import Pass, describe
from mics_core.spec.formula import UnitSize, forecast
from mics_core.spec.sharding import Precision, Sharding
from mics_core.spec.units import UnitRule, find

BATCHES = (1, 2, 4, 8, 16, 32)
"""The micro-batches that are traced: what a loss in chunks holds is no straight line. Between them it is one."""

Sample = Mapping[str, Any] | Tensor | tuple[Any, ...]


@dataclass(frozen=True)
class UnitWork:
    """What one unit takes of one sample, which is a row of the batch."""

    name: str
    size: UnitSize  # elements of the flat buffers, trained and frozen
    forward_flops: float
    activations: int  # bytes kept from forward to backward, its input included
    boundary: int  # bytes of its input: what stays when the unit is recomputed
    transient: int  # most further bytes while its forward or backward runs, gradients of its parameters apart


@dataclass(frozen=True)
class Held:
    """The most bytes that a pass over a micro-batch holds beside the model's state and gathered units."""

    batch: int
    plain: int
    recomputed: int  # with every unit's forward computed again in its backward


@dataclass(frozen=True)
class Workload:
    """A model as the planner sees it."""

    root: UnitWork  # what is in no unit: embeddings, head, loss
    units: tuple[UnitWork, ...]  # in the order of use
    parameters: int  # elements, without padding
    flops_per_sample: float  # forward and backward, nothing computed twice: three times the forward's products
    tokens_per_sample: int
    compute: torch.dtype
    held: tuple[Held, ...] = ()  # by increasing micro-batch

    def live(self, batch: int, *, recompute: bool) -> int:
        """Bytes that a pass over so many samples holds at most: activations, and gradients until they are packed."""
        points = [(held.batch, held.recomputed if recompute else held.plain) for held in self.held]
        if not points:
            units = [unit.boundary if recompute else unit.activations for unit in self.units]
            parts = (self.root.activations, *units, max((u.transient for u in (self.root, *self.units)), default=0))
            return batch * sum(parts)
        if len(points) == 1:
            return points[0][1] * batch // points[0][0]
        pairs = list(pairwise(points))
        (low, below), (high, above) = next((pair for pair in pairs if batch <= pair[1][0]), pairs[-1])
        return below + (above - below) * (batch - low) // (high - low)


def trace(
    model: nn.Module,
    sample: Sample,
    *,
    units: UnitRule | None = None,
    precision: Precision | None = None,
    ranks: int,
) -> Workload:
    """What a forward and backward of the model take, found on the meta device; the model itself is not changed.

    sample: what the model is called with: keywords in a mapping, arguments in a tuple, or one tensor. Rows of its
    tensors are samples, and only their shapes and dtypes count. The model should return its loss: what a loss of its
    outputs takes is not seen. Units count as alike, and only the first of them is traced, if their modules are of the
    same classes with the same plain attributes, and their parameters and inputs have the same shapes. Attention counts
    as computed by a fused kernel. The model must run on the meta device: no `.item()`, no branch on a tensor's values.
    """
    precision = precision or Precision.fp32()
    twin = _to_meta(model, precision.compute)
    rows = _rows(sample)
    formula = forecast(model, Sharding.zero3(), ranks=ranks, ranks_per_node=1, units=units, precision=precision)
    found = find(twin, units)
    described = [describe(unit) for unit in found]
    one, held = None, []
    for batch in BATCHES:
        plain, recomputed = (
            _run(Pass(twin, found, described, recompute=recompute), _batch(sample, rows, batch, precision.compute))
            for recompute in (False, True)
        )
        one = one or plain
        held.append(Held(batch, plain.peak, recomputed.peak))
    assert one is not None
    itemsize = precision.compute.itemsize
    works = [
        UnitWork(str(unit), size, *one.work(number, size.trained * itemsize))
        for number, (unit, size) in enumerate(zip(found, (formula.root, *formula.units), strict=True))
    ]
    return Workload(
        works[0],
        tuple(works[number] for number in one.order()),
        sum(parameter.numel() for parameter in model.parameters()),
        3 * sum(work.forward_flops for work in works),
        next((tensor.shape[1] for tensor in trees.tensors(sample) if tensor.dim() > 1), 1),
        precision.compute,
        tuple(held),
    )


def in_a_line(error: Exception) -> str:
    """The kind of an error of someone else's code, and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def _run(one: Pass, sample: Sample) -> Pass:
    try:
        one.run(sample)
    except ConfigError:
        raise
    except Exception as error:  # of the user's model, so of any kind
        shapes = [tuple(tensor.shape) for tensor in trees.tensors(sample)]
        raise ConfigError(
            f"trace: the model cannot run on the meta device with a sample of shapes {shapes}, expected one that it "
            "takes (in a program, mics.plan(..., sample=...)) and a forward that asks for no values of tensors: "
            f"{in_a_line(error)}"
        ) from error
    return one


def _to_meta(model: nn.Module, compute: torch.dtype) -> nn.Module:
    """A copy without memory, in the dtype of the work; tied weights stay tied."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        parameter = isinstance(tensor, nn.Parameter)
        dtype = compute if parameter and tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, device="meta", dtype=dtype, requires_grad=False)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
    return copy.deepcopy(model, memo)


def _rows(sample: Sample) -> int:
    tensors = [tensor for tensor in trees.tensors(sample) if tensor.dim()]
    counts = sorted({tensor.shape[0] for tensor in tensors})
    if len(counts) != 1:
        raise ConfigError(
            f"trace: the sample's tensors have {counts} rows, expected the same number in all: pass tensors whose "
            "first dimension is the batch"
        )
    return counts[0]


def _batch(sample: Sample, rows: int, batch: int, compute: torch.dtype) -> Any:
    def change(tensor: Tensor) -> Tensor:
        shape = (batch, *tensor.shape[1:]) if tensor.dim() and tensor.shape[0] == rows else tensor.shape
        dtype = compute if tensor.is_floating_point() else tensor.dtype
        return torch.empty(shape, dtype=dtype, device="meta")

    return trees.convert(sample, change)
