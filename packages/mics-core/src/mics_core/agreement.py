"""What is checked before anything is built: a request that can be met, and the same one on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from torch import nn

from mics_core import comm, registry
from mics_core.errors import ConfigError
from mics_core.initialise import check_meta
from mics_core.sharding import Precision, Sharding
from mics_core.slices import has_hook
from mics_core.topology import Rungs, Topology
from mics_core.units import Unit, UnitRule, find


@dataclass(frozen=True)
class Request:
    """What a rank asks for. All but the last two must be alike everywhere.

    `model` stands for the names of units and parameters: of a large model on many ranks they are many megabytes.
    """

    sharding: Sharding | None
    precision: Precision
    ranks_per_node: int | None
    prefetch_bytes: int | None
    model: str
    node: str
    error: str | None


def agree(
    model: nn.Module,
    sharding: Sharding,
    rule: UnitRule | None,
    precision: Precision,
    ranks_per_node: int | None,
    prefetch_bytes: int | None,
    world: comm.World,
) -> tuple[list[Unit], Rungs, Sharding]:
    """The units, the rungs and the resolved sharding. Whatever is wrong on one rank is raised on all."""
    units: list[Unit] = []
    resolved, error = None, None
    try:
        units = _checked_units(model, sharding, precision, rule, ranks_per_node, prefetch_bytes)
        resolved = sharding.resolve(world.size)
    except ConfigError as problem:
        error = str(problem)
    described = _describe(units)
    digest = hashlib.sha256(repr(described).encode()).hexdigest()
    mine = Request(resolved, precision, ranks_per_node, prefetch_bytes, digest, comm.node_name(), error)
    requests: list[Request] = world.tell(mine, "shard")
    for rank, request in zip(world.ranks, requests, strict=True):
        if request.error is not None:
            raise ConfigError(request.error if request.error == mine.error else f"on rank {rank}: {request.error}")
    _check_alike(requests, world.ranks)
    if any(request.model != requests[0].model for request in requests):
        _tell_difference(world.tell(described, "shard"), world.ranks)
    nodes = [request.node for request in requests]
    per_node = ranks_per_node if ranks_per_node is not None else comm.ranks_per_node(nodes, whole_world=world.whole)
    topology = Topology(world.size, per_node)
    comm.check_placement(nodes, min(per_node, world.size), world.ranks)
    assert resolved is not None
    return units, Rungs.of(resolved, topology), resolved


def check_kinds(caller: str, model: object, sharding: object, precision: object) -> None:
    """Raise unless these are what they are called."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{caller}: the model is {model!r}, expected a torch.nn.Module")
    if not isinstance(sharding, Sharding):
        raise ConfigError(
            f"{caller}: sharding is {sharding!r}, expected a mics.Sharding such as Sharding.mics(8)"
            + (', or "auto"' if caller == "shard" else "")
        )
    if not isinstance(precision, Precision):
        raise ConfigError(f"{caller}: precision is {precision!r}, expected a mics.Precision such as Precision.bf16()")


def _checked_units(
    model: nn.Module,
    sharding: Sharding,
    precision: Precision,
    rule: UnitRule | None,
    ranks_per_node: int | None,
    prefetch_bytes: int | None,
) -> list[Unit]:
    check_kinds("shard", model, sharding, precision)
    if ranks_per_node is not None and type(ranks_per_node) is not int:  # True is one, too
        raise ConfigError(f"shard: ranks_per_node is {ranks_per_node!r}, expected a number of ranks, or None")
    if prefetch_bytes is not None and (type(prefetch_bytes) is not int or prefetch_bytes < 0):
        raise ConfigError(f"shard: prefetch_bytes is {prefetch_bytes!r}, expected a number of bytes")
    if registry.owners(model.parameters()) or any(registry.is_sharded(module) for module in model.modules()):
        raise ConfigError(f"shard: this {type(model).__name__} is sharded already, or a part of it: shard it once")
    check_meta(model)
    if precision.compute.itemsize < 4:
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                raise ConfigError(
                    f"shard: {name} is a {type(module).__name__}, whose running statistics are buffers in float32, and "
                    f"torch has none that computes in {precision.compute} with them: use GroupNorm or Precision.fp32()"
                )
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ConfigError(
                f"shard: {name} makes sparse gradients, which have no place in a flat buffer: sparse=False"
            )
    units = find(model, rule)
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


def _check_alike(requests: list[Request], ranks: Sequence[int]) -> None:
    first = requests[0]
    for rank, request in zip(ranks, requests, strict=True):
        for name in ("sharding", "precision", "ranks_per_node", "prefetch_bytes"):
            here, there = getattr(request, name), getattr(first, name)
            if here != there:
                raise ConfigError(
                    f"shard: {name} is {here} on rank {rank} and {there} on rank {ranks[0]}: ask alike everywhere"
                )


def _describe(units: list[Unit]) -> list[tuple[object, ...]]:
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
