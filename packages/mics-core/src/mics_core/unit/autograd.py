"""What the runtime puts into autograd's graph: a node that changes nothing, and tells when its backward runs.

Its context knows a function of the unit, and no tensor of the pass: it would keep the whole graph alive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class _Whole(torch.autograd.Function):
    """The whole parameters of a unit, as far as autograd knows; its backward hands all their gradients over at once."""

    @staticmethod
    def forward(
        ctx: Any, _anchor: torch.Tensor, views: Sequence[torch.Tensor], on_gradients: Callable[..., None]
    ) -> tuple[torch.Tensor, ...]:
        ctx.on_gradients = on_gradients
        ctx.set_materialize_grads(False)
        return tuple([view.detach() for view in views])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[None, None, None]:
        ctx.on_gradients(grads)
        return None, None, None


def whole(
    anchor: torch.Tensor, views: Sequence[torch.Tensor], on_gradients: Callable[..., None]
) -> tuple[torch.Tensor, ...]:
    """The views as tensors to differentiate by; `on_gradients` gets their gradients once all of them are there.

    `anchor` is an empty tensor that requires gradients, which makes autograd keep the node.
    """
    outputs: tuple[torch.Tensor, ...] = _Whole.apply(anchor, views, on_gradients)  # type: ignore[no-untyped-call]
    return outputs


def task() -> int:
    """Which backward is running on this thread; nested ones have numbers of their own. -1 if there is none."""
    return torch._C._current_graph_task_id()
