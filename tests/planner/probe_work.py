"""What the test of `mics probe` and those of "auto" ask ranks to do."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import mics_core as mics
from mics_core import cli, registry
from mics_core.comm import placement
from mics_core.planner.probe import probe


def quick(path: Path) -> mics.Cluster:
    return probe(path, quick=True)


def quick_and_leave(path: Path) -> tuple[int, int]:
    """How many threads there were before the command, and are behind it, with the groups that it found."""
    before = len(os.listdir("/proc/self/task"))
    assert cli.main(["probe", str(path), "--quick"]) == 0
    return before, len(os.listdir("/proc/self/task"))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def auto(memory: list[int]) -> mics.Sharding:
    """The sharding that "auto" takes if ranks have so many bytes."""
    looked_up = placement.rank_memory
    placement.rank_memory = lambda *_: memory[dist.get_rank()]
    try:
        model = mics.shard(Model(), "auto", ranks_per_node=2)
    finally:
        placement.rank_memory = looked_up
    model(torch.ones(2, 64)).backward()
    return registry.runtime_of(model, "test").sharding


def auto_with_wrong_units(rank: int) -> None:
    mics.shard(Model(), "auto", units=[nn.Conv2d] if dist.get_rank() == rank else None)


def auto_on(rank: int) -> None:
    mics.shard(Model(), "auto" if dist.get_rank() == rank else mics.Sharding.ddp())
