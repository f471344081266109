"""`shard`: read it first. It builds the nouns in their order.

topology -> rungs -> ladder        where ranks are, and how a state moves between degrees
unit specs -> units                which parameters travel together, and their memory
gatherer, reducer -> lifecycle     parameters on their way down, gradients on their way up, and when
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from mics_core import registry
from mics_core.comm.ladder import Ladder
from mics_core.comm.world import ProcessGroup, World
from mics_core.errors import LifecycleError
from mics_core.lifecycle import Lifecycle, Phase
from mics_core.registry import Runtime
from mics_core.spec.formula import formula
from mics_core.spec.sharding import Precision, Sharding
from mics_core.spec.units import UnitRule, UnitSpec
from mics_core.step.clipping import Clipping
from mics_core.step.loss_scaling import LossScaling
from mics_core.unit import materialize
from mics_core.unit.gather import Gatherer
from mics_core.unit.reduce import Reducer
from mics_core.unit.shards import Shards
from mics_core.unit.slices import warn_of_state_dict
from mics_core.unit.unit import Unit
from mics_core.validate import Request, agree

Model = TypeVar("Model", bound=nn.Module)


def shard(
    model: Model,
    sharding: Sharding | Literal["auto"],
    *,
    units: UnitRule | None = None,
    precision: Precision | None = None,
    ranks_per_node: int | None = None,
    group: ProcessGroup | World | None = None,
    prefetch_bytes: int | None = None,
) -> Model:
    """Cut the model's parameters, gradients and optimizer state as `sharding` says, in place; returns the same module.

    Call it on every rank, before the optimizer is made. Afterwards `named_parameters()` gives the same names, each a
    1-D slice of this rank's part of the weights: what depends on a parameter's shape, such as which ones decay, asks
    `mics.shape_of`. Train as usual: gradients average over ranks and add over micro-steps.

    sharding: "auto" takes what cuts least of all shardings whose state, gathered units and buffers fit in 60 % of a
        rank's memory. The rest is for activations, which it does not know: `mics.plan` does, and knows links, too.
    units: what is gathered together: classes, or a predicate of name and module. Default: the children of every
        ModuleList. A unit must be called as a module, and parameters be reached through their modules.
    precision: default `Precision.fp32()`.
    ranks_per_node: default as torchrun says, else as host names tell.
    group: the ranks that train this model together, for callers who split the model in other ways, too.
    prefetch_bytes: how much may be gathered ahead of its use; default: the largest unit.

    A model on the meta device is brought to memory unit by unit, by its modules' `reset_parameters()`: the same weights
    for every sharding and number of ranks. Where ranks hold different weights, rank 0's are taken.
    """
    world = group if isinstance(group, World) else World(group)
    precision = Precision.fp32() if precision is None else precision
    request = Request(sharding, units, precision, ranks_per_node, prefetch_bytes)
    specs, rungs, sharding = agree(model, request, world)
    sizes = formula(specs, sharding, precision, rungs.topology, world.rank)
    replaced = [weakref.ref(parameter) for parameter in model.parameters()]
    materialize.make_equal(model, world)

    counters = world.counters()
    ladder = Ladder(rungs, sharding, world, counters)
    cut_units = _cut(model, specs, sharding, precision, ladder, world)

    budget = max(unit.nbytes for unit in cut_units) if prefetch_bytes is None else prefetch_bytes
    gatherer = Gatherer(ladder, sharding, budget)
    reducer = Reducer(cut_units, world, ladder, sharding, precision, counters)
    scaling = LossScaling(precision.loss_scale, world.device) if precision.loss_scale else None
    clipping = Clipping(ladder, sharding.optimizer, scaling, counters, world.device)
    lifecycle = Lifecycle(cut_units, gatherer, reducer, precision.compute, scaling, world.device)
    runtime = Runtime(
        world=world,
        ladder=ladder,
        sharding=sharding,
        precision=precision,
        formula=sizes,
        units=cut_units,
        gatherer=gatherer,
        reducer=reducer,
        scaling=scaling,
        clipping=clipping,
        lifecycle=lifecycle,
        counters=counters,
        parameter_ids=frozenset(id(p) for unit in cut_units for part in unit.parts for p in part.parameters),
        replaced=replaced,
    )
    _hook(runtime)
    registry.enter(model, runtime)
    return model


def _cut(
    model: nn.Module,
    specs: list[UnitSpec],
    sharding: Sharding,
    precision: Precision,
    ladder: Ladder,
    world: World,
) -> list[Unit]:
    """Turn one unit after another from whole parameters into shards."""
    seed: int = world.all_gather_object(torch.initial_seed(), "shard")[0]
    units: list[Unit] = []
    while specs:  # popped one by one: no more than one unit is held twice
        spec = specs.pop(0)
        materialize.draw(spec, model, world.device, seed)
        trained, frozen = (
            Shards(members, sharding, precision, ladder, world, trained=of)
            for of, members in ((True, spec.trained), (False, spec.frozen))
        )
        # Whole values get no name here: one would keep them until the next unit's are there, too.
        trained.fill(materialize.whole_values(spec.trained, world.device))
        frozen.fill(materialize.whole_values(spec.frozen, world.device))
        unit = Unit(len(units), spec, trained, frozen)
        unit.views.register()
        units.append(unit)
    materialize.bring_buffers(model, world.device, seed)
    return units


def _hook(runtime: Runtime) -> None:
    """Let the modules tell the lifecycle. The hooks keep the runtime alive, as long as there is a model."""
    # torch.compile would trace hooks together with the module that they are on.
    opaque: Callable[[Any], Any] = torch.compiler.disable
    for unit in runtime.units:
        unit.module.register_forward_pre_hook(opaque(_before(runtime, unit)), prepend=True, with_kwargs=True)
        # Always: a forward that raises, as a checkpoint's does when it has recomputed enough, leaves its unit, too.
        unit.module.register_forward_hook(opaque(_after(runtime, unit)), always_call=True)
    holders = {site.module for unit in runtime.units for part in unit.parts for sites in part.sites for site in sites}
    before_state_dict = _before_state_dict(runtime)
    for module in holders:
        module.register_state_dict_pre_hook(before_state_dict)  # type: ignore[no-untyped-call]


def _before(runtime: Runtime, unit: Unit) -> Any:
    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if module is not unit.module:
            raise LifecycleError(
                f"{unit.name}: this {type(module).__name__} is a copy of a sharded model's, which has no memory of its "
                "own: copy the model before mics.shard, or its weights inside mics.full_params"
            )
        return runtime.lifecycle.before_forward(unit, args, kwargs)

    return before


def _after(runtime: Runtime, unit: Unit) -> Any:
    def after(module: nn.Module, _: Any, outputs: Any) -> Any:
        if module is not unit.module:
            return None  # a copy, which was refused
        return runtime.lifecycle.after_forward(unit, outputs)

    return after


def _before_state_dict(runtime: Runtime) -> Callable[..., None]:
    warned = False

    def before(*_: Any) -> None:
        nonlocal warned
        if not warned and runtime.lifecycle.phase is not Phase.OPEN:
            warned = True
            warn_of_state_dict()

    return before
