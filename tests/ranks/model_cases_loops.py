"""Models that do more than train, and optimizers beyond one for all."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model_case import Block, Chain, distance, make_optimizer
from model_cases_layers import evaluate


class Evaluated(Chain):
    """evaluation between steps."""

    def between(self, optimizer: Any, batch: Any, step: int) -> Sequence[Tensor]:  # noqa: ARG002
        with torch.inference_mode():
            inferred = self(batch).clone()
        return [inferred, *evaluate(self, batch)]


class Clamped(Chain):
    """weights clamped between steps."""

    def between(self, optimizer: Any, batch: Any, step: int) -> Sequence[Tensor]:  # noqa: ARG002
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.clamp_(-0.15, 0.15)
        return [self(batch).detach()]


class NoBackward(Chain):
    """forwards without a backward."""

    def between(self, optimizer: Any, batch: Any, step: int) -> Sequence[Tensor]:  # noqa: ARG002
        return [self(batch).detach(), self(batch).detach()]

    def loss(self, batch: Tensor, step: int) -> Tensor:
        self(batch)
        return super().loss(batch, step)


class Contrast(Chain):
    """two forwards and one backward."""

    def loss(self, batch: Tensor, step: int) -> Tensor:  # noqa: ARG002
        return distance(self(batch), self(batch.flip(0)))


class Chained(Chain):
    """a model fed with its own output."""

    def loss(self, batch: Tensor, step: int) -> Tensor:  # noqa: ARG002
        return distance(self(self(batch)), batch)


class RetainGraph(Chain):
    """two backwards through one graph."""

    loops = ("plain",)  # accumulate knows which forward is the last, not which backward

    def backward(self, loss: Tensor) -> None:
        loss.backward(retain_graph=True)
        loss.backward()


class InputGradient(Chain):
    """gradients with respect to inputs."""

    def loss(self, batch: Tensor, step: int) -> Tensor:
        batch = batch.clone().requires_grad_()
        (slope,) = torch.autograd.grad(super().loss(batch, step), batch)
        return super().loss((batch + slope.sign()).detach(), step)


class Failure(Exception):
    pass


class Fails(Block):
    """Raises where and when it is told to."""

    where = ""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.where == "forward":
            raise Failure
        if self.where == "backward":
            y.register_hook(self.fail)
        return self.norm(y)

    def fail(self, _: Tensor) -> None:
        raise Failure


class Exceptions(Chain):
    """an exception in a forward or backward, after which training goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1] = Fails()

    def between(self, optimizer: Any, batch: Any, step: int) -> Sequence[Tensor]:
        for where in ("forward", "backward"):
            self.blocks[1].where = where
            try:
                self.loss(batch, step).backward()
            except Failure:
                optimizer.zero_grad()
            else:
                raise AssertionError(f"no failure in the {where}")
        self.blocks[1].where = ""
        return ()


class Dropped(Chain):
    """gradients dropped by zero_grad without a step."""

    def between(self, optimizer: Any, batch: Any, step: int) -> Sequence[Tensor]:
        self.loss(3 * batch, step).backward()
        optimizer.zero_grad()
        return ()


class Scheduled(Chain):
    """a learning rate that a scheduler changes."""

    def between(self, optimizer: Any, batch: Any, step: int) -> Sequence[Tensor]:  # noqa: ARG002
        if step == 0:
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        else:
            self.scheduler.step()
        return ()


class Grouped(Chain):
    """parameter groups with their own learning rate and weight decay."""

    degrees = (2, 2, 4)  # with mics.AdamW, which updates neighbours in one launch

    def optimizer(self, name: str) -> Any:
        groups: list[dict[str, Any]] = [
            {"params": [parameter], "lr": 1e-3 * (1 + number % 5), "weight_decay": 0.1 * (number % 3)}
            for number, parameter in enumerate(self.parameters())
        ]
        groups[0]["params"] += groups.pop(7)["params"]
        del groups[4]  # not trained, but it has a gradient
        return make_optimizer(name, groups)


class Several:
    """Optimizers in turn."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


class TwoOptimizers(Chain):
    """an optimizer for matrices and one for vectors."""

    def optimizer(self, name: str) -> Any:
        vectors = [p for n, p in self.named_parameters() if "bias" in n or "norm" in n]
        matrices = [p for n, p in self.named_parameters() if "bias" not in n and "norm" not in n]
        return Several(make_optimizer("SGD", vectors), make_optimizer(name, matrices))
