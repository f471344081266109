"""What is trained while a recording runs: a small model of a few units, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mics_core as mics
from recording import Recording
from watched_world import WatchedWorld

WIDTH, ROWS = 16, 3


class Block(nn.Module):
    def __init__(self, recomputes: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.recomputes = recomputes

    def inner(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return result

    def forward(self, x: Tensor) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            result: Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return result
        return self.inner(x)


class Model(nn.Module):
    def __init__(self, blocks: int = 4, recomputes: str = "") -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(recomputes == "inside") for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 8)
        self.around = {"around": False, "around, reentrant": True}.get(recomputes)
        self.skipped: set[int] = set()
        self.fails_at = -1

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            if number == self.fails_at:
                raise ArithmeticError
            if number in self.skipped:
                continue
            if self.around is not None and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=self.around)
            else:
                x = block(x)
        loss: Tensor = self.head(x).float().square().mean()
        return loss


@dataclass(frozen=True)
class Setting:
    sharding: tuple[int, int, int]
    precision: str = "bf16"
    micro_steps: int = 2
    marked: bool = True
    clip: bool = True
    optimizer: str = "mics.AdamW"
    recomputes: str = ""
    per_node: int = 2
    world: int = 8
    rank: int = 3
    prefetch: int | None = None

    def __str__(self) -> str:
        words = [",".join(map(str, self.sharding)), f"rank {self.rank} of {self.world}, {self.per_node} a node"]
        words += [self.precision, f"{self.micro_steps} micro-steps" + ("" if self.marked else ", unmarked")]
        words += [self.optimizer] + ([] if self.clip else ["no clip"])
        words += [f"recomputes {self.recomputes}"] if self.recomputes else []
        words += [] if self.prefetch is None else [f"prefetch {self.prefetch}"]
        return "; ".join(words)


PRECISIONS = {
    "fp32": mics.Precision.fp32(),
    "bf16": mics.Precision.bf16(),
    "bf16, reduced in fp32": mics.Precision.bf16(torch.float32),
    "fp16": mics.Precision.fp16(loss_scale=mics.LossScale(initial=256.0)),
    "fp16, reduced in fp16": mics.Precision.fp16(torch.float16, mics.LossScale(initial=256.0)),
    "bf16, int8 between nodes": mics.Precision(
        torch.bfloat16, torch.bfloat16, between_nodes=torch.int8, hop1_between_nodes=torch.int8
    ),
}


def _groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    members = list(parameters)
    return [{"params": members[::2], "weight_decay": 0.0}, {"params": members[1::2], "weight_decay": 0.1}]


# foreach and fused optimizers read and write the same bytes, in fewer launches.
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "mics.AdamW": lambda p: mics.AdamW(p, lr=1e-2, weight_decay=0.1),
    "mics.AdamW, groups": lambda p: mics.AdamW(_groups(p), lr=1e-2),
    "torch.AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, foreach=False),
}


class Trainer:
    """A sharded model and its loop, on a world that takes notes."""

    def __init__(self, setting: Setting, world: WatchedWorld, prepare: Callable[[Model], None] | None = None) -> None:
        torch.manual_seed(0)
        self.setting = setting
        self.world = world
        plain = Model(recomputes=setting.recomputes)
        if prepare is not None:
            prepare(plain)
        self.model = mics.shard(
            plain,
            mics.Sharding(*setting.sharding),
            precision=PRECISIONS[setting.precision],
            ranks_per_node=setting.per_node,
            prefetch_bytes=setting.prefetch,
            group=world,
        )
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = OPTIMIZERS[setting.optimizer](trained)
        self.said: list[Tensor] = []  # losses and norms, which live to the end
        self.batches = list(torch.randn(8, ROWS, WIDTH, generator=torch.Generator().manual_seed(5)).unbind())

    @property
    def recording(self) -> Recording:
        return self.world.recording

    def micro_batches(self) -> Iterable[Tensor]:
        batches = self.batches[: self.setting.micro_steps]
        return mics.accumulate(self.model, batches) if self.setting.marked else batches

    def backward(self) -> None:
        for batch in self.micro_batches():
            loss = self.model(batch)
            (loss / self.setting.micro_steps).backward()
            self.said.append(loss.detach())

    def update(self) -> None:
        if self.setting.clip:
            self.said.append(mics.clip_grad_norm_(self.model, 0.1))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.backward()
        self.update()

    def evaluate(self) -> None:
        with torch.no_grad():
            self.said.append(self.model(self.batches[-1]))
