"""What peers.py runs on every rank: the same training under several runtimes, a step of each in turn."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import mics_core as mics
from bench.cluster import traffic

ROWS = 4


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(x)))
        return out


class Model(nn.Module):
    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@dataclass(frozen=True)
class Runner:
    """One runtime: how it does a step on these micro-batches and returns the loss, with nothing left under way."""

    step: Callable[[list[Tensor]], float]


def mics_runner(make: Callable[[], nn.Module], sharding: mics.Sharding) -> Runner:
    model = mics.shard(make(), sharding)
    optimizer = mics.AdamW(model.parameters(), lr=1e-3)

    def step(batches: list[Tensor]) -> float:
        total = 0.0
        for batch in mics.accumulate(model, batches):
            loss = model(batch) / len(batches)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        mics.ledger(model)  # waits for the refresh, which would hide behind the next forward
        return total

    return Runner(step)


def fsdp2_runner(make: Callable[[], nn.Module], shard: int, *, reshard: bool | int = True) -> Runner:
    """Fully sharded, or HSDP with groups of `shard` ranks and the all-reduce in the last micro-step only."""
    world = dist.get_world_size()
    if shard == world:
        mesh = init_device_mesh("cpu", (world,))
    else:
        mesh = init_device_mesh("cpu", (world // shard, shard), mesh_dim_names=("replicate", "shard"))
    model = make()
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    assert isinstance(model, FSDPModule)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(batches: list[Tensor]) -> float:
        total = 0.0
        for number, batch in enumerate(batches, 1):
            model.set_requires_all_reduce(number == len(batches))
            loss = model(batch) / len(batches)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return Runner(step)


def ddp_runner(make: Callable[[], nn.Module]) -> Runner:
    model = DistributedDataParallel(make())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(batches: list[Tensor]) -> float:
        total = 0.0
        for number, batch in enumerate(batches, 1):
            model.require_backward_grad_sync = number == len(batches)
            loss = model(batch) / len(batches)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return Runner(step)


def runner(name: str, make: Callable[[], nn.Module]) -> Runner:
    """By the name that tables show."""
    kind, _, rest = name.partition(" ")
    if kind == "mics":
        return mics_runner(make, mics.Sharding(*map(int, rest.split(","))))
    if kind == "HSDP":
        return fsdp2_runner(make, int(rest))
    if kind == "FSDP2":
        return fsdp2_runner(make, dist.get_world_size())
    return ddp_runner(make)


def main(names: list[str], width: int, blocks: int, micro_steps: int, rounds: int) -> None:
    mics.init()
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(2)
    batches = list(torch.randn(world, micro_steps, ROWS, width, generator=generator)[rank])
    runners = {name: runner(name, lambda: Model(width, blocks)) for name in names}
    losses: dict[str, list[float]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    sent: dict[str, list[int]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for shift in range(len(names)):
            name = names[(turn + shift) % len(names)]
            dist.barrier()
            before, begun = traffic().sent, time.perf_counter()
            loss = runners[name].step(batches)
            dist.barrier()
            passed, moved = time.perf_counter() - begun, traffic().sent - before
            both = torch.tensor([loss / world], dtype=torch.float64)
            dist.all_reduce(both)
            losses[name].append(both.item())
            if turn:  # the first step records, allocates and connects
                seconds[name].append(passed)
                sent[name].append(moved)
    everyone: list[dict[str, list[int]]] = [{}] * world
    dist.all_gather_object(everyone, sent)
    if rank == 0:
        most = {name: [max(other[name][turn] for other in everyone) for turn in range(rounds)] for name in names}
        print("RESULT", json.dumps({"seconds": seconds, "sent": most, "losses": losses}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), *map(int, sys.argv[2:]))
