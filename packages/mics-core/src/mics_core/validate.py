"""What is checked before anything is built: a request that can be met, and the same one on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal

from torch import nn

from mics_core.comm import placement
from mics_core.comm.agreed import on_all_ranks
from mics_core.comm.world import World
from mics_core.errors import ConfigError
from mics_core.registry import is_sharded
from mics_core.spec.formula import Formula, check_kinds, formula
from mics_core.spec.sharding import Precision, Sharding
from mics_core.spec.topology import Rungs, Topology, shardings
from mics_core.spec.units import UnitRule, UnitSpec, find
from mics_core.unit.materialize import check_meta
from mics_core.unit.slices import has_hook

ROOM = 0.6
"""The share of a rank's memory that "auto" fills with state, gathered units and buffers: activations are unknown."""


@dataclass(frozen=True)
class Request:
    """What a caller of `shard` asks for."""

    sharding: Sharding | Literal["auto"]
    units: UnitRule | None
    precision: Precision
    ranks_per_node: int | None
    prefetch_bytes: int | None


@dataclass(frozen=True)
class _Said:
    """What a rank tells the others. The digest stands for the model's description, which may be many megabytes."""

    request: dict[str, object]
    digest: str
    node: str
    memory: int  # were it alone on its GPU or machine; 0 if nobody asks


def agree(model: nn.Module, request: Request, world: World) -> tuple[list[UnitSpec], Rungs, Sharding]:
    """The units, the rungs and the resolved sharding. Whatever is wrong on one rank is raised on all."""
    units: list[UnitSpec] = []

    def mine() -> _Said:
        _check_request(model, request)
        units.extend(_checked_units(model, request))
        resolved = request.sharding if request.sharding == "auto" else request.sharding.resolve(world.size)
        compared = {name: value for name, value in vars(request).items() if name != "units"} | {"sharding": resolved}
        memory = placement.rank_memory(world.device, 1) if request.sharding == "auto" else 0
        digest = hashlib.sha256(repr(_describe(units)).encode()).hexdigest()
        return _Said(compared, digest, placement.node_name(), memory)

    said = on_all_ranks(world, "shard", mine)
    _check_alike([each.request for each in said], world.ranks)
    if any(each.digest != said[0].digest for each in said):
        _tell_difference(world.all_gather_object(_describe(units), "shard"), world.ranks)
    nodes = [each.node for each in said]
    per_node = request.ranks_per_node
    if per_node is None:
        per_node = placement.ranks_per_node(nodes, whole_world=world.whole)
    topology = Topology(world.size, per_node)
    placement.check_placement(nodes, min(per_node, world.size), world.ranks)
    if request.sharding == "auto":
        whole = formula(units, Sharding(1, 1, 1), request.precision, topology)
        sharding = fitting(whole, int(ROOM * min(each.memory for each in said) / world.sharing(per_node)))
    else:
        sharding = request.sharding.resolve(world.size)
    return units, Rungs.of(sharding, topology), sharding


def fitting(whole: Formula, room: int) -> Sharding:
    """The sharding that cuts least of those whose bytes, activations apart, fit in so much room."""
    topology = whole.rungs.topology
    needed = {}
    for sharding in shardings(topology):
        needed[sharding] = replace(whole, sharding=sharding, rungs=Rungs.of(sharding, topology)).memory()
        if needed[sharding] <= room:
            return sharding
    raise ConfigError(
        f'shard: no sharding over {topology.world} ranks fits: "auto" found {min(needed.values()) / 1e9:.2f} GB at '
        f"least, and {room / 1e9:.2f} GB of a rank's memory for all but activations: use more ranks or smaller units, "
        "or choose a sharding yourself"
    )


def _check_request(model: nn.Module, request: Request) -> None:
    sharding = request.sharding
    if not (isinstance(sharding, Sharding) or sharding == "auto"):
        raise ConfigError(
            f'shard: sharding is {sharding!r}, expected a mics.Sharding such as Sharding.mics(8), or "auto"'
        )
    check_kinds("shard", model, Sharding.ddp(), request.precision)
    per_node, prefetch = request.ranks_per_node, request.prefetch_bytes
    if per_node is not None and type(per_node) is not int:  # True is one, too
        raise ConfigError(f"shard: ranks_per_node is {per_node!r}, expected a number of ranks, or None")
    if prefetch is not None and (type(prefetch) is not int or prefetch < 0):
        raise ConfigError(f"shard: prefetch_bytes is {prefetch!r}, expected a number of bytes")
    if is_sharded(model):
        raise ConfigError(f"shard: this {type(model).__name__} is sharded already, or a part of it: shard it once")
    check_meta(model)
    for name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        if batch_norm and request.precision.compute.itemsize < 4:
            raise ConfigError(
                f"shard: {name} is a {type(module).__name__}, whose running statistics are buffers in float32, and "
                f"torch has none that computes in {request.precision.compute} with them: use GroupNorm or "
                "Precision.fp32()"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ConfigError(
                f"shard: {name} makes sparse gradients, which have no place in a flat buffer: sparse=False"
            )


def _checked_units(model: nn.Module, request: Request) -> list[UnitSpec]:
    units = [unit.arranged(request.precision) for unit in find(model, request.units)]
    for unit in units:
        for member in (*unit.trained, *unit.frozen):
            if not member.parameter.is_floating_point():
                raise ConfigError(
                    f"shard: {member.name} is {member.parameter.dtype}, expected floating point: make it a buffer, "
                    "which every rank keeps whole"
                )
            if has_hook(member.parameter):
                raise ConfigError(
                    f"shard: {member.name} has a hook that waits for its gradient, which no rank will hold whole: "
                    "remove the hook, and read or change p.grad after mics.clip_grad_norm_"
                )
    return units


def _check_alike(requests: Sequence[dict[str, object]], ranks: Sequence[int]) -> None:
    for rank, request in zip(ranks, requests, strict=True):
        for name, here in request.items():
            there = requests[0][name]
            if here != there:
                raise ConfigError(
                    f"shard: {name} is {_shown(here)} on rank {rank} and {_shown(there)} on rank {ranks[0]}: ask alike "
                    "everywhere"
                )


def _shown(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _describe(units: Sequence[UnitSpec]) -> list[tuple[object, ...]]:
    """Each unit, and each of its parameters."""
    lines: list[tuple[object, ...]] = []
    for unit in units:
        lines.append(("unit", unit.name))
        for member in (*unit.trained, *unit.frozen):
            parameter = member.parameter
            lines.append((member.name, tuple(parameter.shape), str(parameter.dtype), parameter.requires_grad))
    return lines


def _tell_difference(models: list[list[tuple[object, ...]]], ranks: Sequence[int]) -> None:
    for rank, model in zip(ranks, models, strict=True):
        for here, there in zip_longest(model, models[0], fillvalue="no more parameters"):
            if here != there:
                raise ConfigError(
                    f"shard: the models differ: rank {rank} has {here} where rank {ranks[0]} has {there}: build the "
                    "same model, with the same units, on every rank"
                )
