"""What a `torch.optim` optimizer needs around its step: gradients before it, new weights brought to the shards after.

One hook before and one after the step of any optimizer, through torch's public registration; an optimizer that holds no
sharded parameter passes through.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mics_core import registry
from mics_core.errors import ConfigError, LifecycleError
from mics_core.optim import stepping
from mics_core.optim.adamw import AdamW
from mics_core.registry import Runtime
from mics_core.unit.slices import check_decay

NOT_ELEMENTWISE = ("adafactor", "came", "lamb", "lars", "lbfgs", "muon", "prodigy", "shampoo", "soap", "sparseadam")
"""Words in the names of optimizers that look at whole tensors: a slice of a matrix is no matrix."""

_checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def watch_optimizers() -> None:
    """Register the two hooks, once."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for runtime in _runtimes(optimizer):
        if optimizer not in _checked:
            _check(optimizer)
        if any(given is not None for given in (*args[1:], *kwargs.values())):  # args begins with the optimizer
            raise ConfigError("step: got a closure, which would make gradients too late: run it before step()")
        present = stepping.begin(runtime, optimizer)
        runtime.clipping.apply(present)
        overflow = runtime.clipping.overflow
        if overflow is not None and overflow.item():  # the step must be skipped; the host waits to know
            # The optimizer finds no gradient and does nothing, and `_after_step` finds none and refreshes nothing.
            for unit in present:
                unit.hide_grads()


def _check(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if any(word in name.lower() for word in NOT_ELEMENTWISE):
        raise ConfigError(
            f"step: {name} looks at whole tensors, and this rank holds 1-D slices of them: use an optimizer that works "
            "element by element, such as mics.AdamW"
        )
    check_decay(optimizer)
    _checked.add(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
    with torch.no_grad():
        for runtime in _runtimes(optimizer):
            present = stepping.settle(runtime, "step")
            for unit in present:
                unit.trained.end_step()
                runtime.gatherer.refresh(unit)
            stepping.end(runtime, present)


def _runtimes(optimizer: Optimizer) -> list[Runtime]:
    if isinstance(optimizer, AdamW) or optimizer in registry.unrelated_optimizers:
        return []
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = registry.owners(parameters)
    if not found:
        if registry.replaced(parameters):
            raise LifecycleError(
                f"step: this {type(optimizer).__name__} holds parameters that mics.shard has replaced: make the "
                "optimizer after mics.shard"
            )
        registry.unrelated_optimizers.add(optimizer)
    return found
