"""What a model is in test_models.py, and the one that most others are a change of.

Each is small, and odd in one way, which its docstring names.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import mics_core as mics

WIDTH = 10
ROWS = 3


class Case(nn.Module):
    """A model with its data and its loss."""

    units: ClassVar[Any] = None
    clip: ClassVar[float | None] = 0.5
    ignored: ClassVar[str] = ""  # how a warning begins that torch gives on its own account
    loops: ClassVar[Sequence[str]] = ("accumulate", "plain")
    degrees: ClassVar[tuple[int, int, int] | None] = None  # of the one way in which the quick tests train it

    @staticmethod
    def batch(generator: torch.Generator) -> Any:
        return torch.randn(ROWS, WIDTH, generator=generator)

    def loss(self, batch: Any, step: int) -> Tensor:  # noqa: ARG002
        return distance(self(batch), batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def prepare(self) -> None:
        """What is done to the model before it is sharded, and not to the reference."""

    def finish(self) -> None:
        """What is done to it after."""

    def between(self, optimizer: Any, batch: Any, step: int) -> Sequence[Tensor]:  # noqa: ARG002
        """What happens before each step, and what is seen then."""
        return ()

    def optimizer(self, name: str) -> Any:
        return make_optimizer(name, self.parameters())


def distance(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs - target.roll(1, -1)).square().mean()


def make_optimizer(name: str, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    if name == "SGD":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)
    kind = mics.AdamW if name == "mics.AdamW" else torch.optim.AdamW
    return kind(parameters, lr=1e-2, eps=1e-4, weight_decay=0.1)


class Block(nn.Module):
    """Smooth, so that rounding changes no branch."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.rise = nn.Linear(width, 2 * width)
        self.fall = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fall(torch.tanh(self.rise(self.norm(x))))


def blocks(count: int = 3) -> nn.ModuleList:
    return nn.ModuleList([Block() for _ in range(count)])


class Chain(Case):
    """units one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = blocks()
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)
