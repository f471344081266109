"""What test_staged.py asks ranks to do: move tensors, and train, as ranks that share a device."""

from __future__ import annotations

import gc
import io
import os
import time
import weakref
from contextlib import redirect_stderr
from functools import partial
from threading import Event
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

import mics_core as mics
from mics_core import registry
from mics_core.comm import placement, staged
from mics_core.comm.groups import Group, HostGroup
from mics_core.comm.lanes import Work
from mics_core.comm.world import World, leave
from pretended_device import StagedWorld
from runtime_work import WIDTH, Model

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)


def _numbers(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, (size,), generator=generator).to(dtype)


def moved(pieces: list[int]) -> list[str]:
    """Transfers of these many elements a piece, all handed in before the first is waited for: what came out wrong."""
    world = StagedWorld()
    rank, ranks = world.rank, tuple(range(world.size))
    lane, group = world.lane("a lane"), world.group(ranks, "a group")
    wrong: list[str] = []
    checks: list[tuple[str, Tensor, Tensor]] = []
    works: list[Work] = []
    for turn, count in enumerate(pieces):
        dtype = DTYPES[turn % len(DTYPES)]
        everyone = torch.cat([_numbers(count, dtype, 100 * turn + other) for other in ranks])
        out = torch.zeros_like(everyone)
        piece = everyone.view(len(ranks), -1)[rank].clone()
        if turn % 2:
            mine = out.view(len(ranks), -1)[rank]
            mine.copy_(piece)
            piece = mine
        works.append(lane.submit("gather", partial(group.all_gather, out, piece)))
        checks.append((f"gather {turn} of {count}", out, everyone))
        sources = [_numbers(count * len(ranks), dtype, 100 * turn + 50 + other) for other in ranks]
        expected = torch.stack([source.view(len(ranks), -1)[rank] for source in sources])
        found = torch.zeros_like(expected)
        works.append(lane.submit("exchange", partial(_exchanged, group, sources[rank].clone(), found)))
        checks.append((f"exchange {turn} of {count}", found, expected))
    for work in works:
        work.wait()
    world.driver.complete()
    wrong += [what for what, found, expected in checks if not torch.equal(found, expected)]
    return wrong


def _exchanged(group: Group, source: Tensor, found: Tensor) -> None:
    for row, part in zip(found, group.exchange(source), strict=True):
        row.copy_(part)


def pinned_after(pieces: list[int]) -> list[int]:
    """The bytes of each pinned memory that was asked for."""
    world = StagedWorld()
    lane, group = world.lane("a lane"), world.group(tuple(range(world.size)), "a group")
    for count in pieces:
        whole = torch.zeros(count * world.size)
        lane.submit("gather", partial(group.all_gather, whole, torch.ones(count))).wait()
        world.driver.complete()
        assert whole.eq(1).all()
    return world.driver.pinned_bytes


def returns_before_the_others_come() -> tuple[bool, bool]:
    """Whether rank 0, which hands in a transfer before the others know of it, goes on; and whether it got all."""
    world = StagedWorld()
    lane, group = world.lane("a lane"), world.group((0, 1), "a group")
    out = torch.zeros(2)
    went_on = True
    if world.rank == 1:
        dist.barrier()  # which rank 0 reaches if it goes on
    work = lane.submit("gather", partial(group.all_gather, out, torch.ones(1)))
    if world.rank == 0:
        time.sleep(0.2)
        went_on = out.eq(0).all().item()
        dist.barrier()
    work.wait()
    return went_on, out.eq(1).all().item()


def trained(sharding: mics.Sharding, precision: mics.Precision, *, staged: bool, seed: int = 0) -> list[Tensor]:
    """The weights after three steps, losses and norms."""
    torch.manual_seed(3)
    world = StagedWorld(seed) if staged else World(None)
    model = mics.shard(Model(3), sharding, ranks_per_node=2, precision=precision, group=world)
    optimizer = mics.AdamW(model.parameters(), lr=1e-2)
    chance = torch.Generator().manual_seed(dist.get_rank())
    said = []
    for _ in range(3):
        for batch in mics.accumulate(model, list(torch.randn(2, 3, WIDTH, generator=chance))):
            loss = model(batch)
            loss.backward()
            said.append(loss.detach())
        said.append(mics.clip_grad_norm_(model, 0.5))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        said.append(model(torch.ones(3, WIDTH)))
    mics.check_replicas(model)
    with mics.full_params(model):
        return [*said, *(parameter.detach().clone() for parameter in model.parameters())]


def same_as_on_a_cpu(sharding: mics.Sharding, precision: mics.Precision, seed: int) -> list[int]:
    """Which of the numbers of a training differ from those of ranks of a CPU."""
    expected = trained(sharding, precision, staged=False)
    found = trained(sharding, precision, staged=True, seed=seed)
    return [number for number, pair in enumerate(zip(found, expected, strict=True)) if not torch.equal(*pair)]


def failing(staged: bool) -> tuple[str, str]:
    """The errors that come with the wait for a gather that the network fails, and with the next submit; all streams go
    on after it.
    """
    world = StagedWorld() if staged else World(None)
    lane, group = world.lane("a lane"), world.group(tuple(range(world.size)), "a group")
    out = torch.zeros(world.size)

    def fails(*_: Any) -> None:
        raise RuntimeError("nothing came from rank 9: its link is down")

    with patch.object(HostGroup, "_wait", fails):
        work = lane.submit("gather of layers.0", partial(group.all_gather, out, torch.ones(1)))
        if isinstance(world, StagedWorld):
            world.driver.complete()
            assert out.view(world.size, -1)[1 - world.rank].isnan().all(), "what did not come is taken for numbers"
        errors = [_raised(work.wait)]
    again = partial(lane.submit, "gather of layers.1", partial(group.all_gather, out, torch.ones(1)))
    errors.append(_raised(lambda: again().wait()))
    return errors[0], errors[1]


def failing_next_submit() -> str:
    """The error of a submit on another lane than the one whose transfer has failed."""
    world = StagedWorld()
    one, other = world.lane("one"), world.lane("other")
    group = world.group(tuple(range(world.size)), "a group")

    def fails(*_: Any) -> None:
        raise RuntimeError("nothing came from rank 9: its link is down")

    with patch.object(HostGroup, "_wait", fails):
        one.submit("hop 1 of layers.0", partial(group.all_gather, torch.zeros(world.size), torch.ones(1)))
        world.driver.complete()
        return _raised(lambda: other.submit("gather of layers.1", list))


def _end(after_an_error: bool) -> None:
    with patch.object(staged, "failed", lambda: after_an_error):
        staged._open_all()


def failing_device() -> str:
    """The error that the host gets that hands in transfers, of which none can leave a device that has failed."""
    world = StagedWorld()
    lane, group = world.lane("a lane"), world.group(tuple(range(world.size)), "a group")

    def fails() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def gathers() -> None:
        world.streams.current_stream().ask(fails)
        for _ in range(9):
            group.all_gather(torch.zeros(world.size), torch.ones(1))

    try:
        return _raised(lambda: lane.submit("gather of layers.0", gathers))
    finally:
        _end(after_an_error=True)


def ending(after_an_error: bool) -> tuple[bool, bool]:
    """Ranks end while all of a gather is still on the device: whether bytes travelled, and whether all that came is
    everyone's.
    """
    world = StagedWorld()
    ranks = tuple(range(world.size))
    lane, group = world.lane("a lane"), world.group(ranks, "a group")
    out, told = torch.zeros(world.size), []

    def late() -> None:
        world.streams.current_stream().ask(partial(time.sleep, 0.3))
        group.all_gather(out, torch.ones(1))

    def noted(self: HostGroup, *args: Any) -> None:
        told.append(args)
        all_gather(self, *args)

    all_gather = HostGroup.all_gather
    with patch.object(HostGroup, "all_gather", noted):
        lane.submit("gather", late)
        _end(after_an_error)
        world.driver.complete()
        world.staging.settle()
    return bool(told), out.eq(1).all().item()


def number_after_the_end_began() -> int:
    """What a stream sees of a transfer that was under way when the process began to end, and is over now."""
    world = StagedWorld()
    lane, group = world.lane("a lane"), world.group(tuple(range(world.size)), "a group")
    begun, ended = Event(), Event()

    def talk(*_: Any) -> None:
        begun.set()
        assert ended.wait(300)

    with patch.object(HostGroup, "all_gather", talk):
        lane.submit("gather", partial(group.all_gather, torch.zeros(world.size), torch.ones(1)))
        assert begun.wait(300)
        _end(after_an_error=True)
        ended.set()
        world.staging.settle()
    return int(group._over.item())


def left_of_a_world() -> tuple[bool, bool]:
    """Whether the collector of cycles is needed to end a staging; whether a page outlives it."""
    gc.disable()
    try:
        world = StagedWorld()
        world.lane("a lane")
        world.group(tuple(range(world.size)), "a group")
        staging, page = weakref.ref(world.staging), weakref.ref(world.staging._page)
        del world
        leave()
        return staging() is not None, page() is not None
    finally:
        gc.enable()


def automatic(memory: int, sharing: bool) -> mics.Sharding:
    """The sharding that "auto" takes if a GPU has so many bytes."""
    world = StagedWorld() if sharing else World(None)
    with patch.object(placement, "rank_memory", lambda *_: memory):
        model = mics.shard(Model(3), "auto", ranks_per_node=1, group=world)
    return registry.runtime_of(model, "test").sharding


def _raised(call: Any) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def started(port: int, places: list[str]) -> tuple[str, str, str, str]:
    """The device that `init` gives, the backend, what rank 0 is told, and the sentence that it raises, if it does."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    told = io.StringIO()
    with (
        patch.dict(os.environ, MASTER_PORT=str(port)),
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.object(torch.cuda, "device_count", lambda: 2),
        patch.object(torch.cuda, "set_device"),
        patch.object(placement, "place", lambda _: places[rank]),
        redirect_stderr(told),
    ):
        try:
            device = mics.init()
        except mics.ConfigError as error:
            return "", "", told.getvalue(), str(error)
    return str(device), dist.get_backend(), told.getvalue(), ""
