"""The model that all variants train, and the wait that can stand in for its computation."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 4
"""Samples of a micro-batch: few, so that the computation takes next to nothing."""


@dataclass(frozen=True)
class StandIn:
    """Seconds that every block waits in a micro-step, where a GPU would compute. A wait needs no core.

    So two cores can play many GPUs: what is measured is what a runtime does beside and between the waits.
    """

    forward: float = 0.0
    backward: float = 0.0


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stand_in: StandIn) -> Tensor:
        ctx.stand_in = stand_in
        time.sleep(stand_in.forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.stand_in.backward)
        return grads[0], None


class Block(nn.Module):
    """Two matrices, a unit; its wait is behind its forward, so before its gradients."""

    def __init__(self, width: int, stand_in: StandIn) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.stand_in = stand_in

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(x)))
        if self.stand_in != StandIn():
            out = _Wait.apply(out, self.stand_in)  # type: ignore[no-untyped-call]
        return out


class Model(nn.Module):
    """A row of blocks, the same weights on every rank."""

    def __init__(self, width: int, blocks: int, stand_in: StandIn) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(width, stand_in) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()
