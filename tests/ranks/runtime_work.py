"""What the tests of the runtime's accounts ask ranks to do: train a small model, and tell what moved and was held."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mics_core as mics
from mics_core import registry
from mics_core.comm.ladder import Ladder, Route, lane_name
from mics_core.comm.lanes import Work
from mics_core.comm.recorded import COMPUTE, Kind, RecordedWorld
from mics_core.spec.formula import Traffic
from mics_core.spec.topology import Scope

WIDTH, BLOCKS = 32, 4


Pairs = Mapping[tuple[str, int], tuple[str, int]]


class Meetings:
    """Computations that each wait for a transfer, which waits for the computation: both must be under way at once.

    `pairs` names, for a block's computation, the transfer that it meets, and which occurrence of that name it is. Who
    waits alone gives up after a while, which is an error.
    """

    patience = 100.0  # seconds; only ends a hang

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs
        self._begun = {transfer: Event() for transfer in pairs.values()}
        self._over = {transfer: Event() for transfer in pairs.values()}
        self._sent: dict[str, int] = {}

    def compute(self, way: str, block: int) -> None:
        """A block's forward or backward."""
        if transfer := self._pairs.get((way, block)):
            self._begun[transfer].set()
            if not self._over[transfer].wait(self.patience):
                raise RuntimeError(f"the {way} of block {block} is under way, and {transfer} does not come")

    @contextmanager
    def arranged(self) -> Iterator[None]:
        """Inside, transfers take part."""
        submit = Ladder.submit

        def submit_met(
            ladder: Ladder,
            route: Any,
            scope: Any,
            what: str,
            job: Callable[[], None],
            after: Sequence[Work] = (),
        ) -> Work:
            transfer = what, self._sent.get(what, 0)
            self._sent[what] = transfer[1] + 1

            def met() -> None:
                if not self._begun[transfer].wait(self.patience):
                    raise RuntimeError(f"{transfer} is under way, and no computation beside it")
                job()
                self._over[transfer].set()

            return submit(ladder, route, scope, what, met if transfer in self._begun else job, after)

        Ladder.submit = submit_met  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            Ladder.submit = submit  # type: ignore[method-assign]

    def met(self) -> list[tuple[str, int]]:
        """The transfers that took part."""
        return [transfer for transfer, over in self._over.items() if over.is_set()]


class Computing(torch.autograd.Function):
    """A block's computation, as far as a meeting is concerned."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, block: Block) -> Tensor:
        ctx.block = block
        block.meetings.compute("forward", block.number)
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.block.meetings.compute("backward", ctx.block.number)
        return grad, None


class Block(nn.Module):
    """Two layers, 2 * WIDTH * WIDTH elements."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.number = number
        self.meetings = Meetings({})

    def forward(self, x: Tensor) -> Tensor:
        return Computing.apply(x + self.down(torch.relu(self.up(x))), self)


class Model(nn.Module):
    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.embedding = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(Block(number) for number in range(blocks))

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
    parcels: tuple[int, int]  # bytes that lanes keep for what travels in eight bits, and those of the formula


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
        kept = sum(room.nbytes for room in registry.runtime_of(model, "test").ladder.rooms.values())
        parcels = kept, ledger.formula.working()["parcels"]
        result.append(Account(sharding, ledger.counted, ledger.predicted(micro_steps, marked=marked), memory, parcels))
    return result


def live_bytes(expected: int, *, beside: int = 0) -> int:
    """Bytes of all tensors made since the last `gc.freeze`, each memory once.

    As expected, or up to `beside` more; or what there is at last.

    gloo's threads hold a message for a moment after its end, and nothing says when they have let go.
    """
    deadline = time.monotonic() + 60  # only ends a hang
    while not expected <= (found := _live_bytes()) <= expected + beside and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def _live_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def memory(sharding: mics.Sharding, precision: mics.Precision) -> list[tuple[int, int]]:
    """Bytes that a sharded model holds after shard and after each step, each with what the formula says."""
    warm = mics.shard(Model(), sharding, ranks_per_node=2, precision=precision)
    steps(warm, mics.AdamW(warm.parameters()), 1, 2, marked=True)  # the kernels' own small tables
    mics.ledger(warm)  # waits for what is under way
    del warm
    gc.collect()
    gc.freeze()
    model = mics.shard(Model(), sharding, ranks_per_node=2, precision=precision)
    formula = registry.runtime_of(model, "test").formula
    at_rest = sum(formula.at_rest().values())
    expected = [at_rest - formula.at_rest()["optimizer"], *[at_rest + sum(formula.working().values())] * 5]
    found = [live_bytes(expected[0])]
    optimizer = mics.AdamW(model.parameters())
    for each in expected[1:]:
        steps(model, optimizer, 1, 2, marked=True)
        mics.ledger(model)  # waits for what is under way
        found.append(live_bytes(each))
    return list(zip(found, expected, strict=True))


def gathered(sharding: mics.Sharding, prefetch_bytes: int | None) -> tuple[int, list[int], int]:
    """The most bytes of whole units, the bytes of each, and the budget for what is gathered ahead."""
    model = mics.shard(Model(), sharding, ranks_per_node=2, prefetch_bytes=prefetch_bytes)
    steps(model, mics.AdamW(model.parameters()), 3, 2, marked=True)
    runtime = registry.runtime_of(model, "test")
    return runtime.gatherer.peak, [unit.nbytes for unit in runtime.units], runtime.gatherer.budget


def handed_to_lanes(sharding: mics.Sharding) -> list[list[tuple[str, str]]]:
    """Of three steps, each lane and job in the order of the host: of this rank, and of the recording that pretends to
    be it.
    """
    found: list[list[tuple[str, str]]] = []
    submit = Ladder.submit

    def noting(ladder: Ladder, route: Route, scope: Scope, what: str, *job: Any, **after: Any) -> Work:
        found[-1].append((f"{lane_name(ladder.rungs, route, scope)}, {scope.value}", what))
        return submit(ladder, route, scope, what, *job, **after)

    recorded = RecordedWorld(dist.get_world_size(), dist.get_rank())
    for world in (None, recorded):
        found.append([])
        with patch.object(Ladder, "submit", noting):
            model = mics.shard(Model(), sharding, ranks_per_node=2, group=world)
            optimizer = mics.AdamW(model.parameters())
            for _ in range(3):
                for batch in mics.accumulate(model, list(torch.randn(2, 3, WIDTH))):
                    model(batch).backward()
                mics.clip_grad_norm_(model, 1.0)
                optimizer.step()
                optimizer.zero_grad()
    written = [(entry.stream, entry.what) for entry in recorded.program.entries if entry.kind is Kind.RECORD]
    assert [each for each in written if each[0] != COMPUTE] == found[1]
    return found


def meet(sharding: mics.Sharding, pairs: Pairs) -> list[tuple[str, int]]:
    """Train a step whose computations meet these transfers, from the optimizer step before; the transfers met."""
    model = mics.shard(Model(6), sharding, ranks_per_node=1)
    optimizer = mics.AdamW(model.parameters())
    steps(model, optimizer, 2, 1, marked=True)  # the order of units is known from the second step on
    for batch in mics.accumulate(model, list(torch.randn(1, 3, WIDTH))):
        model(batch).backward()
    mics.ledger(model)  # waits for what is under way
    meetings = Meetings(pairs)
    for block in model.blocks:
        block.meetings = meetings
    with meetings.arranged():
        optimizer.step()
        optimizer.zero_grad()
        steps(model, optimizer, 1, 1, marked=True)
        mics.ledger(model)
    return meetings.met()
