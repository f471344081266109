"""What the tests of a checkpoint's contents ask ranks to do."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import mics_core as mics
from checkpoint_work import Cluster, train, whole


class Counting(nn.Module):
    """What each rank has seen is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen[0] += x.sum()
        for block in self.blocks:
            x = block(x)
        return x


def build(cluster: Cluster, optimizer: Any = mics.AdamW) -> tuple[Counting, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = mics.shard(Counting(), cluster.sharding, ranks_per_node=cluster.per_node)
    return model, optimizer(model.parameters(), lr=0.1)


def count(cluster: Cluster, folder: Path) -> list[float]:
    """A rank's buffer when it saved."""
    model, optimizer = build(cluster)
    train(model, optimizer, 0, 2)
    mics.save(folder / "step-2", model, optimizer)
    return model.seen.tolist()  # type: ignore[no-any-return,operator,union-attr]


def count_on(cluster: Cluster, folder: Path) -> list[float]:
    """A rank's buffer after loading."""
    model, optimizer = build(cluster)
    train(model, optimizer, 7, 1)
    mics.load(folder / "latest", model, optimizer)
    return model.seen.tolist()  # type: ignore[no-any-return,operator,union-attr]


def draw(cluster: Cluster, folder: Path, save: bool) -> tuple[float, float, float]:
    """The next random numbers after a save or a load."""
    rank = dist.get_rank()
    torch.manual_seed(rank + (0 if save else 50))
    model, optimizer = build(cluster)
    random.seed(rank + (0 if save else 50))
    np.random.seed(rank + (0 if save else 50))
    torch.manual_seed(rank + (0 if save else 50))
    if save:
        mics.save(folder / "step-0", model, optimizer)
    else:
        mics.load(folder, model, optimizer)
    return random.random(), float(np.random.rand()), torch.rand(()).item()


class Stepper(torch.optim.Optimizer):
    """Keeps Python's numbers in its state."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["step"] = state.get("step", 0) + 1
                    state["decay"] = 0.5 ** state["step"]
                    state["warm"] = state["step"] > 1
                    parameter -= group["lr"] * state["decay"] * parameter.grad


def keep_numbers(before: Cluster, folder: Path) -> list[Any]:
    """The state when saved, of one parameter."""
    model, optimizer = build(before, Stepper)
    train(model, optimizer, 0, 3)
    mics.save(folder / "step-3", model, optimizer)
    return list(next(iter(optimizer.state.values())).items())


def read_numbers(after: Cluster, folder: Path) -> list[Any]:
    """The state of one parameter when loaded."""
    model, optimizer = build(after, Stepper)
    mics.load(folder, model, optimizer)
    train(model, optimizer, 3, 1)
    return list(next(iter(optimizer.state.values())).items())


def with_names(before: Cluster, after: Cluster, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """torch's optimizers keep the names that parameters came with."""
    weights = []
    for cluster in (before, after):
        torch.manual_seed(1)
        model = mics.shard(Counting(), cluster.sharding, ranks_per_node=cluster.per_node)
        optimizer = torch.optim.AdamW(list(model.named_parameters())[:: 1 if cluster is before else -1], lr=0.1)
        if cluster is before:
            train(model, optimizer, 0, 2)
            mics.save(folder / "step-2", model, optimizer)
        else:
            mics.load(folder, model, optimizer)
        train(model, optimizer, 2, 2)
        weights.append(whole(model))
    return weights[0], weights[1]


def load_again(cluster: Cluster, folder: Path, kind: Any) -> tuple[set[int], set[int]]:
    """Where the moments are before a load and after it."""
    model, optimizer = build(cluster, kind)
    train(model, optimizer, 0, 2)
    mics.save(folder / "step-2", model, optimizer)
    train(model, optimizer, 2, 1)
    places = []
    for _ in range(2):
        state = optimizer.state_dict()["state"]
        moments = [value for entry in state.values() for value in entry.values() if value.dim() and value.numel()]
        places.append({moment.data_ptr() for moment in moments})
        mics.load(folder, model, optimizer)
    return places[0], places[1]


def expanded(folder: Path) -> None:
    """A buffer whose elements share memory."""
    model, optimizer = build(Cluster(2, 2, mics.Sharding(1, 1, 2)))
    model.register_buffer("mask", torch.ones(1).expand(4))
    mics.save(folder / "step-1", model, optimizer)


class Pair(nn.Module):
    """Two layers, which may share their weights."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))
        if tied:
            self.blocks[1].weight = self.blocks[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x))  # type: ignore[no-any-return]


def tie_or_not(folder: Path, saved_tied: bool) -> tuple[str, bool]:
    """Load what was saved untied into a tied model, or the other way; what it says, and whether weights changed."""
    sharding = mics.Sharding(1, 1, 2)
    mics.save(folder / "step-1", mics.shard(Pair(tied=saved_tied), sharding), None)
    torch.manual_seed(5)
    model = mics.shard(Pair(tied=not saved_tied), sharding)
    before = whole(model)
    said = "loaded"
    try:
        mics.load(folder, model, None)
    except ValueError as error:
        said = str(error)
    after = whole(model)
    return said, any(not torch.equal(before[name], after[name]) for name in before)
