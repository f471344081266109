"""A unit as the conductor sees it: its memory, its gradient, and the places where its modules look for parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from mics_core import trees
from mics_core.errors import LifecycleError
from mics_core.gather import Gathered
from mics_core.places import Places
from mics_core.reduce import Reduced
from mics_core.slices import check_hooks


class Station:
    """A unit under the conductor: its memory, its gradient, and the places where its modules look for parameters."""

    def __init__(self, number: int, module: nn.Module, gathered: Gathered, reduced: Reduced | None) -> None:
        self.number = number
        self.module = module
        self.gathered = gathered
        self.reduced = reduced
        self.places = [(part, Places(part)) for part in gathered.shards]
        self._keeps: list[tuple[dict[str, Any], str]] | None = None
        self.awaited = 0  # backwards that the forwards of this pass have announced
        self.finish: Callable[..., None] = lambda *_: None  # what `Whole` calls

    def _left_behind(self) -> Iterator[torch.Tensor]:
        """Tensors with a graph that the unit's modules keep in attributes, such as a second loss.

        The first forward looks everywhere, later ones where it found some.
        """
        if self._keeps is None:
            attributes = ((vars(module), name) for module in self.module.modules() for name in list(vars(module)))
            self._keeps = [(kept, name) for kept, name in attributes if _has_graph(kept[name])]
        for kept, name in self._keeps:
            if _has_graph(kept.get(name)):
                yield kept[name]

    def watch_outputs(self, outputs: Any, begin: Callable[[torch.Tensor], None]) -> None:
        """Call `begin` before the backward of any of what the forward returned or left behind."""
        found = False
        returned = list(trees.tensors(outputs))
        for tensor in returned:
            self._check_own(tensor)
        for tensor in (*returned, *self._left_behind()):
            found = True
            if tensor.requires_grad:
                tensor.register_hook(begin)  # type: ignore[no-untyped-call]
        if not found and self.reduced is not None:
            raise LifecycleError(
                f"{self.gathered.unit}: forward returned {type(outputs).__name__}, in which no tensor can be found, so "
                "its backward would go unnoticed: return tensors in tuples, lists, dicts or dataclasses"
            )

    def _check_own(self, output: torch.Tensor) -> None:
        for part in self.gathered.shards:
            if not part.rests and part.holds(output):
                raise LifecycleError(
                    f"{self.gathered.unit}: its forward returned one of its parameters, whose memory is given back "
                    "now: return a copy of it, or make the module that uses it part of the same unit"
                )

    def watch_inputs(self, inputs: tuple[Any, Any]) -> None:
        """A unit without trained parameters is finished when the gradients of its inputs are there."""
        watched = [tensor for tensor in trees.tensors(inputs) if tensor.requires_grad]
        missing = len(watched)

        def hook(_: torch.Tensor) -> None:
            nonlocal missing
            missing -= 1
            if not missing:
                for handle in handles:  # of a leaf, such as a learned prompt, they would stay for ever
                    handle.remove()
                self.finish(())

        handles = [tensor.register_hook(hook) for tensor in watched]  # type: ignore[no-untyped-call]

    def check_frozen(self) -> None:
        """Raise if a parameter that was frozen when the model was cut is to be trained now."""
        for part, _ in self.places:
            if not part.trained and any(parameter.requires_grad for parameter in part.parameters):
                raise LifecycleError(
                    f"{self.gathered.unit}: a parameter that was frozen at mics.shard requires a gradient now, and "
                    "has no memory for one: let it require gradients before mics.shard, and freeze it after"
                )

    def check_hooks(self) -> None:
        """Raise if a user waits for the gradient of a slice: none comes there."""
        for part, _ in self.places:
            if part.trained:
                for slot, parameter in zip(part.layout.slots, part.parameters, strict=True):
                    check_hooks(slot.name, parameter)

    def clear(self) -> None:
        """Let modules see what they saw before, and raise if someone wrote into the whole parameters."""
        for part, places in self.places:
            places.clear()
            if part.changed():
                raise LifecycleError(
                    f"{self.gathered.unit}: a parameter was changed in place while it was gathered, and the change "
                    "would be lost: change parameters inside `with mics.full_params(model)`"
                )


def _has_graph(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.grad_fn is not None
