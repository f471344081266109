"""What the tests of the runtime's accounts ask ranks to do: train a small model, and tell what moved and was held."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import mics_core as mics
from mics_core import registry
from mics_core.ladder import Ladder, Route
from mics_core.ledger import Traffic

WIDTH, BLOCKS = 32, 4


class Block(nn.Module):
    """Two layers, 2 * WIDTH * WIDTH elements, and a wait for the time that a computation would take."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.relu(self.up(x)))
        return Wait.apply(x, self.seconds)


class Wait(torch.autograd.Function):
    """A stand-in for arithmetic: so long in the forward, twice as long in the backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return grad, None


class Model(nn.Module):
    def __init__(self, blocks: int = BLOCKS, seconds: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(Block(seconds) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return x.float().square().mean()


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, micro_steps: int, *, marked: bool) -> None:
    for _ in range(count):
        batches = list(torch.randn(micro_steps, 3, WIDTH))
        for batch in mics.accumulate(model, batches) if marked else batches:
            (model(batch) / micro_steps).backward()
        optimizer.step()
        optimizer.zero_grad()


@dataclass(frozen=True)
class Account:
    """What one rank sent in a step after the first, what the formula says, and bytes moved in memory per parameter."""

    sharding: mics.Sharding
    counted: dict[tuple[str, str], Traffic]
    predicted: dict[tuple[str, str], Traffic]
    memory: dict[str, float]


def accounts(
    shardings: list[mics.Sharding],
    per_node: int,
    precision: mics.Precision,
    micro_steps: int,
    marked: bool,
    blocks: int,
) -> list[Account]:
    result = []
    for sharding in shardings:
        model = mics.shard(Model(blocks), sharding, ranks_per_node=per_node, precision=precision)
        optimizer = mics.AdamW(model.parameters())
        steps(model, optimizer, 1, micro_steps, marked=marked)
        mics.ledger(model).reset()
        steps(model, optimizer, 1, micro_steps, marked=marked)
        ledger = mics.ledger(model)
        parameters = WIDTH * WIDTH * (1 + 2 * blocks)
        memory = {operation: count / parameters for operation, count in ledger.memory.items()}
        result.append(Account(sharding, ledger.counted, ledger.predicted(micro_steps, marked=marked), memory))
    return result


def live_bytes() -> int:
    """Bytes of all tensors that exist, each memory once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def memory(sharding: mics.Sharding, precision: mics.Precision, prefetch_bytes: int | None) -> dict[str, object]:
    """Bytes that a sharded model holds: after shard, after each step, and the most that was gathered."""
    warm = mics.shard(Model(), sharding, ranks_per_node=2, precision=precision)
    steps(warm, mics.AdamW(warm.parameters()), 1, 2, marked=True)  # the kernels' own small tables
    mics.ledger(warm)  # waits for what is under way
    del warm
    before = live_bytes()
    model = mics.shard(Model(), sharding, ranks_per_node=2, precision=precision, prefetch_bytes=prefetch_bytes)
    after_shard = live_bytes() - before
    optimizer = mics.AdamW(model.parameters())
    after_step = []
    for _ in range(5):
        steps(model, optimizer, 1, 2, marked=True)
        mics.ledger(model)  # waits for what is under way
        after_step.append(live_bytes() - before)
    runtime = registry.runtime_of(model, "test")
    gatherer = runtime.conductor.gatherer
    units = [station.gathered.bytes for station in runtime.conductor.stations]
    return {
        "after shard": after_shard,
        "after steps": after_step,
        "at rest": runtime.formula.at_rest(),
        "working": runtime.formula.working(),
        "peak": gatherer.peak,
        "units": units,
        "budget": gatherer.budget,
    }


@contextmanager
def slow(seconds: float, *actions: str) -> Iterator[None]:
    """Let these transfers take so much longer."""
    descend, climb = Ladder.descend, Ladder.climb

    def slow_descend(self: Ladder, route: Route, action: str, *args: object) -> None:
        if action in actions:
            time.sleep(seconds)
        descend(self, route, action, *args)  # type: ignore[arg-type]

    def slow_climb(self: Ladder, route: Route, action: str, *args: object) -> list[Tensor]:
        if action in actions:
            time.sleep(seconds)
        return climb(self, route, action, *args)  # type: ignore[arg-type]

    Ladder.descend, Ladder.climb = slow_descend, slow_climb  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Ladder.descend, Ladder.climb = descend, climb  # type: ignore[method-assign]


def timed(sharding: mics.Sharding, compute: float, transfer: float, *actions: str) -> tuple[float, float]:
    """Seconds of a step with slow transfers, and of one whose transfers take no time."""
    model = mics.shard(Model(6, compute), sharding, ranks_per_node=1)
    optimizer = mics.AdamW(model.parameters())
    steps(model, optimizer, 2, 1, marked=True)
    times = []
    for wait in (transfer, 0.0):
        with slow(wait, *actions):
            best = []
            for _ in range(3):
                begin = time.perf_counter()
                steps(model, optimizer, 1, 1, marked=True)
                mics.ledger(model)
                best.append(time.perf_counter() - begin)
            times.append(min(best))
    return times[0], times[1]


def timed_refresh(sharding: mics.Sharding, compute: float, transfer: float) -> tuple[float, float]:
    """Seconds of two steps one after the other, less those of one: with slow refreshes and with fast ones."""
    model = mics.shard(Model(6, compute), sharding, ranks_per_node=1)
    optimizer = mics.AdamW(model.parameters())
    steps(model, optimizer, 2, 1, marked=True)
    times = []
    for wait in (transfer, 0.0):
        with slow(wait, "refresh"):
            best = []
            for _ in range(3):
                steps(model, optimizer, 1, 1, marked=True)
                begin = time.perf_counter()
                steps(model, optimizer, 1, 1, marked=True)
                best.append(time.perf_counter() - begin)
                mics.ledger(model)
            times.append(min(best))
    return times[0], times[1]


def stood_still(sharding: mics.Sharding, transfer: float) -> tuple[float, float, float]:
    """Seconds that a step without computation stood still, by the ledger; what the step took; and after a reset."""
    model = mics.shard(Model(6), sharding, ranks_per_node=1)
    optimizer = mics.AdamW(model.parameters())
    steps(model, optimizer, 2, 1, marked=True)
    with slow(transfer, "gather"):
        mics.ledger(model).reset()
        begin = time.perf_counter()
        steps(model, optimizer, 1, 1, marked=True)
        ledger = mics.ledger(model)
        took = time.perf_counter() - begin
    exposed = ledger.exposed
    ledger.reset()
    return exposed, took, mics.ledger(model).exposed
