"""What the runtime puts into autograd's graph: two nodes that change nothing, and tell when their backward runs.

A node's context knows a function of the unit, and no tensor of the pass: it would keep the whole graph alive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class _Whole(torch.autograd.Function):
    """The whole parameters of a unit, as far as autograd knows; its backward hands all their gradients over at once."""

    @staticmethod
    def forward(
        ctx: Any, _anchor: torch.Tensor, views: Sequence[torch.Tensor], finish: Callable[..., None]
    ) -> tuple[torch.Tensor, ...]:
        ctx.finish = finish
        ctx.set_materialize_grads(False)
        return tuple([view.detach() for view in views])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[None, None, None]:
        ctx.finish(grads)
        return None, None, None


class _Entrance(torch.autograd.Function):
    """The inputs of a unit, unchanged; its backward runs when the unit needs its parameters no more."""

    @staticmethod
    def forward(ctx: Any, finish: Callable[..., None], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.finish = finish
        return tuple([tensor.view_as(tensor) for tensor in inputs])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.finish(())
        return (None, *grads)


def whole(anchor: torch.Tensor, views: Sequence[torch.Tensor], finish: Callable[..., None]) -> tuple[torch.Tensor, ...]:
    """The views as tensors to differentiate by; `finish` gets their gradients, when those of all of them are there.

    `anchor` is an empty tensor that requires gradients, which makes autograd keep the node.
    """
    outputs: tuple[torch.Tensor, ...] = _Whole.apply(anchor, views, finish)  # type: ignore[no-untyped-call]
    return outputs


def entrance(finish: Callable[..., None], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The inputs of a unit, unchanged; `finish` is called when the unit's backward needs its parameters no more."""
    outputs: tuple[torch.Tensor, ...] = _Entrance.apply(finish, *inputs)  # type: ignore[no-untyped-call]
    return outputs
