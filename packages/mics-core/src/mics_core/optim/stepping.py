"""What every optimizer does around its update, whoever wrote it: gradients before, new weights brought after."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from mics_core.registry import Runtime
from mics_core.unit.unit import Unit


def settle(runtime: Runtime, caller: str) -> list[Unit]:
    """The units that have a gradient, which is the mean over all ranks now."""
    runtime.lifecycle.require_rest(caller)
    runtime.lifecycle.free()  # what a loop that was left early has prefetched: the step changes what gathers read
    if not runtime.reducer.agreed:
        runtime.clipping.begin()
    return runtime.reducer.finish()


def clip(runtime: Runtime, max_norm: float) -> torch.Tensor:
    """Shrink all gradients so that their norm is at most `max_norm`; the norm before."""
    present = settle(runtime, "clip_grad_norm_")
    runtime.ladder.order.call(f"a clip of the norm to {max_norm}")
    return runtime.clipping.clip(present, max_norm)


def begin(runtime: Runtime, optimizer: Optimizer) -> list[Unit]:
    """The units that are to be updated.

    Settings should be those of all ranks: where this optimizer's state is cut over all of them, nothing else tells.
    What is a tensor may be on a device, and is not read.
    """
    present = settle(runtime, "step")
    settings = [
        {name: _host_numbers(value) for name, value in group.items() if name in optimizer.defaults}
        for group in optimizer.param_groups
    ]
    runtime.ladder.order.call(f"a step of {type(optimizer).__name__} with {settings}")
    runtime.clipping.find_overflow(present)
    for unit in present:
        if unit.trained.sends_differences:
            unit.refreshing.wait()  # another optimizer's step began it, and it reads the masters that are to change
    return present


def end(runtime: Runtime, present: list[Unit]) -> None:
    """The optimizer has used these gradients."""
    if runtime.reducer.mark_stepped() and runtime.scaling is not None:
        runtime.clipping.find_overflow(present)
        assert runtime.clipping.overflow is not None
        runtime.scaling.update(runtime.clipping.overflow)


def _host_numbers(value: Any) -> object:
    """A setting of an optimizer as ranks compare it."""
    if isinstance(value, tuple | list):
        return tuple([_host_numbers(each) for each in value])
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__
