"""What shared.py runs on every rank: transfers of whole numbers, and a training beside that of one process."""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import mics_core as mics
from bench.gpu.probes import Net
from bench.ranks import report
from mics_core.comm.groups import Group
from mics_core.comm.world import World

PIECES = (1, 1000, 16, 4096, 3, 1, 500_000, 2, 2, 2, 7, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)
WIDTH, STEPS = 256, 3


def moved(device: torch.device) -> list[str]:
    """What came out wrong of transfers that are all handed in before the first is waited for."""
    world = World(None)
    ranks = tuple(range(world.size))
    lane, group = world.lane("check", urgent=True), world.group(ranks, "check")
    checks, works = [], []
    for turn, count in enumerate(PIECES):
        dtype = DTYPES[turn % len(DTYPES)]

        def numbers(rank: int, size: int, turn: int = turn, dtype: torch.dtype = dtype) -> Tensor:
            chance = torch.Generator().manual_seed(100 * turn + rank)
            return torch.randint(0, 8, (size,), generator=chance).to(device, dtype)

        everyone = torch.cat([numbers(rank, count) for rank in ranks])
        out = torch.zeros_like(everyone)
        piece = out.view(world.size, -1)[world.rank]
        piece.copy_(everyone.view(world.size, -1)[world.rank])
        works.append(lane.submit("check", partial(group.all_gather, out, piece)))
        checks.append((f"gather {turn} of {count}", out, everyone))
        sources = torch.stack([numbers(50 + rank, count * world.size) for rank in ranks])
        expected = sources.view(world.size, world.size, -1)[:, world.rank].sum(0, dtype=dtype)
        found = torch.zeros_like(expected)
        works.append(lane.submit("check", partial(_summed, group, sources[world.rank].clone(), found)))
        checks.append((f"exchange {turn} of {count}", found, expected))
    for work in works:
        work.wait()
    return [what for what, found, expected in checks if not torch.equal(found, expected)]


def _summed(group: Group, source: Tensor, found: Tensor) -> None:
    for part in group.exchange(source):
        found.add_(part)


def apart(device: torch.device, sharding: mics.Sharding) -> tuple[float, list[Tensor]]:
    """How far weights are from those of one process that sees all batches; and the weights."""
    world, rank = dist.get_world_size(), dist.get_rank()
    whole = Net(WIDTH).to(device)
    model = mics.shard(copy.deepcopy(whole), sharding, ranks_per_node=max(1, world // 2))
    ours = mics.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    theirs = torch.optim.AdamW(whole.parameters(), lr=1e-2, eps=1e-4)
    for number in range(STEPS):
        chance = torch.Generator().manual_seed(number)
        batches = torch.randn(2, world, 4, WIDTH, generator=chance).to(device)
        for batch in mics.accumulate(model, list(batches[:, rank])):
            (model(batch) / 2).backward()
        for batch in batches.flatten(0, 1):
            (whole(batch) / (2 * world)).backward()
        mics.clip_grad_norm_(model, 1.0)
        torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    mics.check_replicas(model)
    with mics.full_params(model):
        mine = [parameter.detach().clone() for parameter in model.parameters()]
    return max((a - b).abs().max().item() for a, b in zip(mine, whole.parameters(), strict=True)), mine


def say(what: str, found: object) -> None:
    """At once: ranks that are killed leave what they had."""
    print(f"  rank {os.environ['RANK']}: {what}: {found}", file=sys.stderr, flush=True)


def main(words: Sequence[str]) -> None:
    how, where = words
    if how == "nccl":
        os.environ["NCCL_HOSTID"] = f"host of rank {os.environ['RANK']}"
    begun = time.perf_counter()
    device = mics.init()
    torch.set_num_threads(1)
    world = dist.get_world_size()
    group = type(World(None).group(tuple(range(world)), "kind")).__name__
    found: dict[str, Any] = {"device": str(device), "group": group, "backend": dist.get_backend()}
    say("begins", found)
    wrong = moved(device)
    found["wrong transfers"] = wrong
    say("wrong transfers", wrong)
    shardings = [mics.Sharding(world, world, world), mics.Sharding(1, 1, world)]
    if world >= 4:
        shardings += [mics.Sharding(2, 2, world), mics.Sharding(world // 2, world // 2, world // 2)]
    right = not wrong
    for sharding in shardings:
        away, weights = apart(device, sharding)
        _, again = apart(device, sharding)
        same = all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
        name = f"{sharding.params},{sharding.grads},{sharding.optimizer}"
        found[name] = {"apart": away, "repeats": same}
        say(name, found[name])
        right &= away < 1e-3 and same
    expected = "HostGroup" if where == "pretend" else "DeviceGroup" if how == "nccl" else "StagedGroup"
    found |= {"right": right and group == expected, "seconds": time.perf_counter() - begun}
    all_right = torch.tensor(int(found["right"]))
    dist.all_reduce(all_right, dist.ReduceOp.MIN)
    found["right"] = bool(all_right.item())
    if dist.get_rank() == 0:
        report(found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
