"""`shard`: read it first. It builds the nouns in their order and hands them to the conductor.

topology -> rungs -> ladder       where ranks are, and how a state moves between degrees
units -> shards                   which parameters travel together, and their memory
gatherer, reducer -> conductor    parameters on their way down, gradients on their way up, and who says when
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from mics_core import agreement, comm, initialise, registry
from mics_core.clipping import Clipping
from mics_core.errors import LifecycleError
from mics_core.gather import Gathered, Gatherer
from mics_core.ladder import Ladder
from mics_core.ledger import Formula, Tally, UnitSize
from mics_core.lifecycle import Conductor
from mics_core.phases import Phase
from mics_core.places import Places
from mics_core.planner import automatic
from mics_core.reduce import Reduced, Reducer
from mics_core.scaling import Scaling
from mics_core.sharding import Precision, Sharding
from mics_core.shards import Shards
from mics_core.slices import warn_of_state_dict
from mics_core.station import Station
from mics_core.units import Unit, UnitRule

Model = TypeVar("Model", bound=nn.Module)


def shard(
    model: Model,
    sharding: Sharding | Literal["auto"],
    *,
    units: UnitRule | None = None,
    precision: Precision | None = None,
    ranks_per_node: int | None = None,
    group: comm.ProcessGroup | None = None,
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
    world = comm.World(group)
    precision = Precision.fp32() if precision is None else precision
    if sharding == "auto" and isinstance(model, nn.Module):
        sharding = automatic.choose(model, units, precision, ranks_per_node, prefetch_bytes, world)
    found, rungs, sharding = agreement.agree(model, sharding, units, precision, ranks_per_node, prefetch_bytes, world)
    initialise.make_equal(model, world)
    tally = Tally(world.device)
    ladder = Ladder(rungs, sharding, world, tally)
    cutter = _Cutter(model, sharding, precision, ladder, world)
    # Popped one by one: a unit's whole parameters are freed as soon as it is cut.
    stations = [cutter.station(number, found.pop(0)) for number in range(len(found))]
    cutter.bring_buffers()

    reducer = Reducer(
        [station.reduced for station in stations if station.reduced is not None],
        world,
        ladder,
        sharding,
        precision,
        tally,
    )
    if prefetch_bytes is None:
        prefetch_bytes = max(station.gathered.bytes for station in stations)
    gatherer = Gatherer(ladder, sharding, prefetch_bytes)
    scaling = Scaling(precision.loss_scale, world.device) if precision.loss_scale else None
    conductor = Conductor(stations, gatherer, reducer, precision.compute, scaling, world.device)
    clipping = Clipping(ladder, sharding.optimizer, scaling, tally, world.device)
    runtime = Runtime(world, ladder, sharding, precision, conductor, clipping, tally)
    runtime.replaced = cutter.replaced
    runtime.hook()
    registry.enter(model, runtime)
    return model


class _Cutter:
    """Turns one unit after another from whole parameters into shards, so that no more than one is held twice."""

    def __init__(
        self, model: nn.Module, sharding: Sharding, precision: Precision, ladder: Ladder, world: comm.World
    ) -> None:
        self._model = model
        self._sharding = sharding
        self._precision = precision
        self._ladder = ladder
        self._world = world
        self._seed: int = world.tell(torch.initial_seed(), "shard")[0]
        self.replaced: list[weakref.ref[nn.Parameter]] = []

    def station(self, number: int, unit: Unit) -> Station:
        """Cut one unit."""
        initialise.draw(unit, self._model, self._world.device, self._seed)
        parts = []
        for members in (unit.trained, unit.frozen):
            if members:
                values = initialise.whole_values(members, self._world.device)
                part = Shards(members, self._sharding, self._precision, self._ladder, self._world.device)
                part.fill(values)
                Places(part).register()
                parts.append(part)
                self.replaced += [weakref.ref(member.parameter) for member in members]
        reduced = next((Reduced(str(unit), part) for part in parts if part.trained), None)
        return Station(number, unit.module, Gathered(str(unit), parts), reduced)

    def bring_buffers(self) -> None:
        """Buffers stay whole on every rank."""
        initialise.bring_buffers(self._model, self._world.device, self._seed)


class Runtime:
    """A sharded model's parts, and what optimizers ask of them."""

    def __init__(
        self,
        world: comm.World,
        ladder: Ladder,
        sharding: Sharding,
        precision: Precision,
        conductor: Conductor,
        clipping: Clipping,
        tally: Tally,
    ) -> None:
        self.world = world
        self.ladder = ladder
        self.sharding = sharding
        self.precision = precision
        self.conductor = conductor
        self.reducer = conductor.reducer
        self.tally = tally
        self.parameter_ids = {
            id(p) for station in conductor.stations for part in station.gathered.shards for p in part.parameters
        }
        self.replaced: list[weakref.ref[nn.Parameter]] = []  # what was in the model before
        self._clipping = clipping
        self._station_of = {id(s.reduced): s for s in conductor.stations if s.reduced is not None}
        self._fused: set[int] = set()  # units that mics.AdamW updates

    def hook(self) -> None:
        """Let the modules tell the conductor. The hooks keep the runtime alive, as long as there is a model."""
        # torch.compile would trace hooks together with the module that they are on.
        opaque: Callable[[Any], Any] = torch.compiler.disable
        for station in self.conductor.stations:
            module = station.module
            module.register_forward_pre_hook(opaque(_before(self, station)), prepend=True, with_kwargs=True)
            # Always: a forward that raises, as a checkpoint's does when it has recomputed enough, leaves its unit, too.
            module.register_forward_hook(opaque(_after(self, station)), always_call=True)
        parts = [part for station in self.conductor.stations for part in station.gathered.shards]
        holders = {site.module for part in parts for sites in part.sites for site in sites}
        before_state_dict = _before_state_dict(self)
        for module in holders:
            module.register_state_dict_pre_hook(before_state_dict)  # type: ignore[no-untyped-call]

    @property
    def formula(self) -> Formula:
        """What must move, from the sharding alone."""
        sizes = [
            UnitSize(
                sum(part.layout.size for part in station.gathered.shards if part.trained),
                sum(part.layout.size for part in station.gathered.shards if not part.trained),
            )
            for station in self.conductor.stations
        ]
        return Formula(self.sharding, self.precision, self.ladder.rungs, sizes[0], tuple(sizes[1:]))

    def rest(self, caller: str) -> None:
        """Raise unless no forward or backward is under way."""
        if self.conductor.busy():
            raise LifecycleError(
                f"{caller}: called inside the model's {self.conductor.phase.value}, expected after it: gradients and "
                "parameters are still in use"
            )

    def wait(self) -> None:
        """Let all that is under way arrive."""
        for station in self.conductor.stations:
            gathered = station.gathered
            self.conductor.gatherer.arrive(gathered)
            gathered.refreshed.wait()
            if station.reduced is not None:
                station.reduced.latest.wait()

    def settle(self, caller: str) -> list[Reduced]:
        """The units that have a gradient, which is the mean over all ranks now."""
        self.rest(caller)
        self.conductor.drop_fetched()  # by a loop that was left early: the step changes what gathers read
        if not self.reducer.settled:
            self._clipping.begin()
        return self.reducer.settle()

    def clip(self, max_norm: float) -> torch.Tensor:
        """Shrink all gradients so that their norm is at most `max_norm`; the norm before."""
        present = self.settle("clip_grad_norm_")
        self.ladder.order.call(f"a clip of the norm to {max_norm}")
        norm = self._clipping.clip(present, max_norm)
        if not all(id(reduced) in self._fused for reduced in present):
            self._clipping.apply(present)
        return norm

    def adopt(self, updated: list[Reduced]) -> None:
        """mics.AdamW updates these units, and multiplies by the clip factor as it reads gradients."""
        self._fused.update(id(reduced) for reduced in updated)

    def pending(self, present: list[Reduced]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The factor that gradients are still to be multiplied by, and the flag that skips the step."""
        return self._clipping.factor(present)

    def unscale(self, present: list[Reduced]) -> bool:
        """Multiply the gradients by what is pending; False if the step must be skipped, for which the host waits."""
        self._clipping.apply(present)
        _, overflow = self._clipping.factor(present)
        return overflow is None or not overflow.item()

    def stepping(self, optimizer: Optimizer) -> None:
        """This optimizer is going to step, with settings that should be those of all ranks: where its state is cut over
        all of them, nothing else tells. What is a tensor may be on a device, and is not read.
        """
        settings = [
            {name: _host_numbers(value) for name, value in group.items() if name in optimizer.defaults}
            for group in optimizer.param_groups
        ]
        self.ladder.order.call(f"a step of {type(optimizer).__name__} with {settings}")

    def refresh(self, reduced: Reduced) -> None:
        """The optimizer has changed this unit's `refreshed`."""
        self.conductor.gatherer.refresh(self._station_of[id(reduced)].gathered)

    @torch.no_grad()
    def loaded(self) -> None:
        """All masters were overwritten: bring the weights to where gathers start, and forget the gradients."""
        for reduced in self.reducer.all:
            reduced.forget()
        for station in self.conductor.stations:
            for part in station.gathered.shards:
                part.refresh()
            self.conductor.gatherer.refresh(station.gathered)

    def stepped(self, present: list[Reduced]) -> None:
        """An optimizer has used the gradients."""
        if self.reducer.stepped() and self.conductor.scaling is not None:
            _, overflow = self._clipping.factor(present)
            assert overflow is not None
            self.conductor.scaling.update(overflow)


def _host_numbers(value: Any) -> object:
    """A setting of an optimizer as ranks compare it."""
    if isinstance(value, tuple | list):
        return tuple([_host_numbers(each) for each in value])
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__


def _before(runtime: Runtime, station: Station) -> Any:
    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if module is not station.module:
            raise LifecycleError(
                f"{station.gathered.unit}: this {type(module).__name__} is a copy of a sharded model's, which has no "
                "memory of its own: copy the model before mics.shard, or its weights inside mics.full_params"
            )
        return runtime.conductor.before_forward(station, args, kwargs)

    return before


def _before_state_dict(runtime: Runtime) -> Callable[..., None]:
    told = False

    def before(*_: Any) -> None:
        nonlocal told
        if not told and runtime.conductor.phase is not Phase.OPEN:
            told = True
            warn_of_state_dict()

    return before


def _after(runtime: Runtime, station: Station) -> Any:
    def after(module: nn.Module, _: Any, outputs: Any) -> Any:
        if module is not station.module:
            return None  # a copy, which was refused
        return runtime.conductor.after_forward(station, outputs)

    return after
