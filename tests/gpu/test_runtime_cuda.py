"""What only a GPU can show of the runtime: no host sync and no new memory in a steady step, on streams of its own."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import mics_core as mics
from mics_core import registry
from mics_kernels.tables import _SCRATCH

pytestmark = pytest.mark.gpu

WIDTH, BLOCKS = 256, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).float().square().mean()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Tensor, *, sharded: bool) -> None:
    for batch in mics.accumulate(model, list(batches)) if sharded else list(batches):
        (model(batch) / len(batches)).backward()
    if sharded:
        mics.clip_grad_norm_(model, 1.0)
    else:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def pretended_world(size: int, rank: int) -> Iterator[None]:
    """Collectives that move nothing: enough for streams, memory and what the host waits for."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "precision",
    [mics.Precision.fp32(), mics.Precision.bf16(), mics.Precision.fp16(loss_scale=mics.LossScale(initial=256.0))],
    ids=str,
)
def test_one_rank_trains_as_plain_pytorch(precision: mics.Precision) -> None:
    reference = Model().cuda()
    model = mics.shard(copy.deepcopy(reference), mics.Sharding.mics(1), precision=precision)
    ours = mics.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-3, eps=1e-4)
    for number in range(5):
        batches = torch.randn(2, 8, WIDTH, device="cuda", generator=torch.Generator("cuda").manual_seed(number))
        step(model, ours, batches, sharded=True)
        step(reference, theirs, batches, sharded=False)
    tolerance = 1e-5 if precision.compute == torch.float32 else 2e-2
    with mics.full_params(model):
        for mine, expected in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sharding", [mics.Sharding(8, 8, 8), mics.Sharding(2, 2, 8), mics.Sharding(4, 4, 4)], ids=str)
def test_a_steady_step_neither_waits_for_the_device_nor_takes_new_memory(sharding: mics.Sharding) -> None:
    with pretended_world(8, 3):
        model = mics.shard(Model(), sharding, ranks_per_node=2, precision=mics.Precision.bf16())
        optimizer = mics.AdamW(model.parameters())
        batches = torch.zeros(3, 8, WIDTH, device="cuda")
        # Tables of new addresses take memory, which may move the next step's gradients, until addresses come again.
        tables: list[int] = []
        while tables[-3:] != [len(_SCRATCH)] * 3:
            assert len(tables) < 20, f"tables in each step: {tables}"
            tables.append(len(_SCRATCH))
            step(model, optimizer, batches, sharded=True)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        reserved = torch.cuda.memory_reserved()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                step(model, optimizer, batches, sharded=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == held
        assert torch.cuda.memory_reserved() == reserved


def test_gathered_parameters_are_not_read_before_they_arrive() -> None:
    """A gather that is slow on its stream: the computation must wait for it, and the host must not."""
    with pretended_world(2, 0):
        from mics_core.comm.groups import DeviceGroup

        def slow(_: DeviceGroup, out: Tensor, piece: Tensor) -> None:
            torch.cuda._sleep(20_000_000)
            out.view(2, -1).copy_(piece.expand(2, -1))  # what the other rank would send: the same

        original, DeviceGroup.all_gather = DeviceGroup.all_gather, slow
        try:
            model = mics.shard(Model(), mics.Sharding.mics(2), ranks_per_node=2)
            for unit in registry.runtime_of(model, "test").units:
                for part in unit.parts:
                    part.shard.fill_(0.5)
            x = torch.ones(1, WIDTH, device="cuda")
            with torch.no_grad():
                first, second = model(x), model(x)
            expected = Model().cuda()
            with torch.no_grad():
                for parameter in expected.parameters():
                    parameter.fill_(0.5)
                torch.testing.assert_close(first, expected(x))
            torch.testing.assert_close(first, second)
        finally:
            DeviceGroup.all_gather = original
