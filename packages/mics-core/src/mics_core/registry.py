"""Which models are sharded, and whose a parameter is.

Held weakly on both sides: a model keeps its runtime alive, by its hooks, and this table keeps neither.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from mics_core.errors import LifecycleError

if TYPE_CHECKING:
    from mics_core.runtime import Runtime

_runtimes: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Runtime]] = weakref.WeakKeyDictionary()

strangers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""Optimizers that hold no sharded parameter, as far as is known."""


def enter(model: nn.Module, runtime: Runtime) -> None:
    """This model is sharded now."""
    _runtimes[model] = weakref.ref(runtime)
    strangers.clear()


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has seen this model."""
    return model in _runtimes


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
