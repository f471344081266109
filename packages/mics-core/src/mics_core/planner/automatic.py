"""The sharding for `mics.shard(model, "auto")`: the one that cuts least of those whose state leaves room enough."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mics_core import comm
from mics_core.agreement import Request
from mics_core.errors import ConfigError
from mics_core.forecast import forecast
from mics_core.ledger import Formula
from mics_core.planner.candidate import shardings
from mics_core.sharding import Precision, Sharding
from mics_core.topology import Rungs, Topology
from mics_core.units import UnitRule

ROOM = 0.6
"""The share of a rank's memory that its state, gathered units and buffers may take: activations are unknown."""


@dataclass(frozen=True)
class Room(Request):
    """What a rank says that asks for "auto": a request, so that ranks that ask for something else hear of it."""

    memory: int


def choose(
    model: nn.Module,
    units: UnitRule | None,
    precision: Precision,
    ranks_per_node: int | None,
    prefetch_bytes: int | None,
    world: comm.World,
) -> Sharding:
    """The same choice on every rank, for the rank with the least memory; what is wrong on one is raised on all."""
    formula, error = None, None
    try:
        formula = forecast(
            model, Sharding.ddp(), ranks=world.size, ranks_per_node=world.size, units=units, precision=precision
        )
    except ConfigError as problem:
        error = str(problem)
    digest = hashlib.sha256(repr(formula).encode()).hexdigest()
    asked: Any = "auto"
    node = comm.node_name()
    mine = Room(asked, precision, ranks_per_node, prefetch_bytes, digest, node, error, _memory(world.device))
    told: list[Request] = world.tell(mine, "shard")
    for rank, request in zip(world.ranks, told, strict=True):
        if request.error is not None:
            raise ConfigError(request.error if request.error == mine.error else f"on rank {rank}: {request.error}")
    here = world.ranks[world.rank]
    for rank, request in zip(world.ranks, told, strict=True):
        if not isinstance(request, Room):
            raise ConfigError(
                f'shard: sharding is "auto" on rank {here} and {request.sharding} on rank {rank}: ask alike everywhere'
            )
        if (request.model, request.ranks_per_node) != (mine.model, ranks_per_node):
            raise ConfigError(
                f'shard: with "auto", rank {rank} has another model, precision or ranks_per_node than rank {here}: ask '
                "alike everywhere"
            )
    assert formula is not None
    nodes = [request.node for request in told]
    per_node = ranks_per_node if ranks_per_node is not None else comm.ranks_per_node(nodes, whole_world=world.whole)
    topology = Topology(world.size, per_node)
    shared = world.device.type == "cpu"
    memory = min(request.memory for request in told if isinstance(request, Room))
    return fitting(formula, topology, int(ROOM * memory / (min(per_node, world.size) if shared else 1)))


def fitting(formula: Formula, topology: Topology, room: int) -> Sharding:
    """The sharding that cuts least of those whose bytes, activations apart, fit in so much room."""
    least: int | None = None
    for sharding in shardings(topology):
        cut = replace(formula, sharding=sharding, rungs=Rungs.of(sharding, topology))
        needed = sum(cut.at_rest().values()) + cut.gathered() + sum(cut.working().values())
        if needed <= room:
            return sharding
        least = needed if least is None else min(least, needed)
    raise ConfigError(
        f'shard: no sharding over {topology.world} ranks fits: "auto" found {least / 1e9 if least else 0:.2f} GB at '
        f"least, and {room / 1e9:.2f} GB of a rank's memory for all but activations: use more ranks or smaller units, "
        "or choose a sharding yourself"
    )


def _memory(device: torch.device) -> int:
    """Of this rank's GPU, or of the machine whose CPUs ranks share."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
