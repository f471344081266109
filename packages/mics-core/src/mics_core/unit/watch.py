"""When a unit's backward begins and ends: hooks on what its forward got, returned or left in an attribute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from mics_core import trees
from mics_core.errors import LifecycleError
from mics_core.unit.unit import Unit


def watch_outputs(unit: Unit, outputs: Any, begin: Callable[[torch.Tensor], None]) -> None:
    """Call `begin` before the backward of any of what the forward returned or left behind."""
    returned = list(trees.tensors(outputs))
    for tensor in returned:
        _check_own(unit, tensor)
    found = [*returned, *_left_behind(unit)]
    for tensor in found:
        if tensor.requires_grad:
            tensor.register_hook(begin)  # type: ignore[no-untyped-call]
    if not found and unit.trains:
        raise LifecycleError(
            f"{unit.name}: forward returned {type(outputs).__name__}, in which no tensor can be found, so its backward "
            "would go unnoticed: return tensors in tuples, lists, dicts or dataclasses"
        )


def watch_inputs(inputs: tuple[Any, Any], on_gradients: Callable[[], None]) -> None:
    """Call `on_gradients` when the gradients of all inputs are there: so ends a unit without trained parameters."""
    watched = [tensor for tensor in trees.tensors(inputs) if tensor.requires_grad]
    missing = len(watched)

    def hook(_: torch.Tensor) -> None:
        nonlocal missing
        missing -= 1
        if not missing:
            for handle in handles:  # of a leaf, such as a learned prompt, they would stay for ever
                handle.remove()
            on_gradients()

    handles = [tensor.register_hook(hook) for tensor in watched]  # type: ignore[no-untyped-call]


def _check_own(unit: Unit, output: torch.Tensor) -> None:
    for part in unit.parts:
        if not part.stays_whole and part.holds(output):
            raise LifecycleError(
                f"{unit.name}: its forward returned one of its parameters, whose memory is given back now: return a "
                "copy of it, or make the module that uses it part of the same unit"
            )


def _left_behind(unit: Unit) -> Iterator[torch.Tensor]:
    """Tensors with a graph that the unit's modules keep in attributes, such as a second loss.

    The first forward looks everywhere, later ones where it found some.
    """
    if unit.left_behind is None:
        attributes = ((vars(module), name) for module in unit.module.modules() for name in list(vars(module)))
        unit.left_behind = [(kept, name) for kept, name in attributes if _has_graph(kept[name])]
    for kept, name in unit.left_behind:
        if _has_graph(kept.get(name)):
            yield kept[name]


def _has_graph(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.grad_fn is not None
