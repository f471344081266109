"""What a sharding will take, before any memory is taken: for a model on the meta device, too."""

from __future__ import annotations

from torch import nn

from mics_core.agreement import check_kinds
from mics_core.layout import Layout
from mics_core.ledger import Formula, UnitSize
from mics_core.sharding import Precision, Sharding
from mics_core.topology import Rungs, Topology
from mics_core.units import Member, UnitRule, find


def forecast(
    model: nn.Module,
    sharding: Sharding,
    *,
    ranks: int,
    ranks_per_node: int,
    units: UnitRule | None = None,
    precision: Precision | None = None,
) -> Formula:
    """The bytes that a rank will hold and send, by the formula that `ledger` compares with what is counted.

    Nothing is sent and nothing changes; the arguments mean what they mean to `shard`.
    """
    precision = Precision.fp32() if precision is None else precision
    check_kinds("forecast", model, sharding, precision)
    resolved = sharding.resolve(ranks)
    found = find(model, units)

    def elements(members: tuple[Member, ...]) -> int:
        shapes = [(member.name, tuple(member.parameter.shape)) for member in members]
        return Layout.plan(shapes, ranks).size if members else 0

    sizes = [UnitSize(elements(unit.trained), elements(unit.frozen)) for unit in found]
    rungs = Rungs.of(resolved, Topology(ranks, ranks_per_node))
    return Formula(resolved, precision, rungs, sizes[0], tuple(sizes[1:]))
