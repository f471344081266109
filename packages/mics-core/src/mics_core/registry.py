"""The parts of a sharded model, and which models are sharded.

Held weakly on both sides: a model keeps its runtime alive, by its hooks, and this table keeps neither.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from mics_core.comm.counters import Counters
from mics_core.comm.ladder import Ladder
from mics_core.comm.world import World
from mics_core.errors import LifecycleError
from mics_core.lifecycle import Lifecycle
from mics_core.spec.formula import Formula
from mics_core.spec.sharding import Precision, Sharding
from mics_core.step.clipping import Clipping
from mics_core.step.loss_scaling import LossScaling
from mics_core.unit.gather import Gatherer
from mics_core.unit.reduce import Reducer
from mics_core.unit.unit import Unit


@dataclass(frozen=True, eq=False)
class Runtime:
    """A sharded model's parts."""

    world: World
    ladder: Ladder
    sharding: Sharding
    precision: Precision
    formula: Formula
    units: Sequence[Unit]
    gatherer: Gatherer
    reducer: Reducer
    scaling: LossScaling | None
    clipping: Clipping
    lifecycle: Lifecycle
    counters: Counters
    parameter_ids: frozenset[int]
    replaced: Sequence[weakref.ref[nn.Parameter]]  # what was in the model before

    def wait(self) -> None:
        """Let all that is under way arrive."""
        for unit in self.units:
            self.gatherer.wait_unshard(unit)
            unit.refreshing.wait()
            unit.reducing.wait()


_runtimes: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Runtime]] = weakref.WeakKeyDictionary()

unrelated_optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""Optimizers that hold no sharded parameter, as far as is known."""


def enter(model: nn.Module, runtime: Runtime) -> None:
    """This model is sharded now."""
    _runtimes[model] = weakref.ref(runtime)
    unrelated_optimizers.clear()


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has seen this model, or a part of it."""
    return bool(owners(model.parameters())) or any(module in _runtimes for module in model.modules())


def runtime_of(model: nn.Module, caller: str) -> Runtime:
    """The runtime of a sharded model."""
    runtime = _runtimes[model]() if model in _runtimes else None
    if runtime is None:
        raise LifecycleError(f"{caller}: this {type(model).__name__} is not sharded: call mics.shard(model, ...) first")
    return runtime


def owners(parameters: Iterable[nn.Parameter]) -> list[Runtime]:
    """The runtimes whose parameters are among these."""
    mine = {id(parameter) for parameter in parameters}
    return [runtime for runtime in _all() if not runtime.parameter_ids.isdisjoint(mine)]


def replaced(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether one of these was a model's before the model was sharded."""
    mine = {id(parameter): parameter for parameter in parameters}
    old = (ref() for runtime in _all() for ref in runtime.replaced)
    return any(parameter is not None and mine.get(id(parameter)) is parameter for parameter in old)


def _all() -> list[Runtime]:
    return [runtime for ref in list(_runtimes.values()) if (runtime := ref()) is not None]
