"""A program: one process that is a few of 64 ranks in turn, whose messages go nowhere; prints what they would send.

Its weights mean nothing, since what peers send never comes: calls and bytes are all it counts.
"""

import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import mics_core as mics
from mics_core.spec.formula import Traffic

WORLD, PER_NODE = 64, 8


class Model(nn.Module):
    """Blocks one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16, bias=number > 0) for number in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = torch.relu(block(x))
        return x.float().square().mean()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, micro_steps: int, marked: bool) -> None:
    batches = list(torch.ones(micro_steps, 2, 16))
    for batch in mics.accumulate(model, batches) if marked else batches:
        model(batch).backward()
    mics.clip_grad_norm_(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def plain(traffic: dict[tuple[str, str], Traffic]) -> dict[str, list[int]]:
    return {", ".join(key): [entry.calls, entry.bytes] for key, entry in sorted(traffic.items())}


def accounts(rank: int, degrees: list[int], micro_steps: int, marked: bool) -> list[dict[str, list[int]]]:
    """What a step sends, counted and predicted."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
    try:
        precision = mics.Precision.bf16()
        model = mics.shard(Model(), mics.Sharding(*degrees), ranks_per_node=PER_NODE, precision=precision)
        optimizer = mics.AdamW(model.parameters())
        step(model, optimizer, micro_steps, marked)
        ledger = mics.ledger(model)
        ledger.reset()
        step(model, optimizer, micro_steps, marked)
        ledger = mics.ledger(model)
        return [plain(ledger.counted), plain(ledger.predicted(micro_steps, marked=marked))]
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    print(json.dumps([accounts(*case) for case in json.loads(sys.argv[1])]))
