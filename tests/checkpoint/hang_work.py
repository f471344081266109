"""What the tests of disks that hang ask ranks to do."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import mics_core as mics
from mics_core import registry
from mics_core.checkpoint import reading, saving
from mics_core.checkpoint.at_disk import Task
from mics_core.checkpoint.manifest import Manifest
from mics_core.comm.world import World
from mics_core.lifecycle import Phase

MANY = 5  # looks; three that see nothing are the end


def sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = mics.shard(nn.Linear(40, 40), mics.Sharding.mics(2))  # of less one rank might have padding alone
    return model, mics.AdamW(model.parameters())


@contextmanager
def instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    real = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)


def said_where(
    rank: int, how: str, owner: Any, name: str, job: Callable[[], object], when: Callable[[], bool] = lambda: True
) -> str:
    """What a job says while a function hangs on a rank, or goes on until it has been looked at many times.

    Two seconds count as the timeout: only for looks, as messages between ranks may be late on a busy machine. The
    disk brings nothing to its plates, as a busy one may take longer.
    """
    real, end, real_looks, seen = getattr(owner, name), threading.Event(), Task.looks, []

    def call(*arguments: Any) -> Any:
        if dist.get_rank() == rank and how == "hangs" and when():
            end.wait()
        while dist.get_rank() == rank and len(seen) < MANY and how == "goes on":
            time.sleep(0.01)
        return real(*arguments)

    def looks(self: Task[Any]) -> int:
        seen.append(self)
        return real_looks(self)

    quick = ExitStack()
    for sync in ("fsync", "fdatasync"):
        quick.enter_context(instead(os, sync, lambda _: None))
    with quick, instead(owner, name, call), instead(World, "timeout", 2.0), instead(Task, "looks", looks):
        try:
            job()
        except RuntimeError as error:
            return str(error)
        finally:
            end.set()
    return "nothing"


def save(folder: Path, how: str, background: bool) -> str:
    """What is said of a save in which rank 1 hangs while it writes, or goes on slowly."""
    model, optimizer = sharded()
    mics.save(folder / "step-1", model, optimizer)
    path = folder / "step-2"
    return said_where(1, how, saving, "write", lambda: mics.save(path, model, optimizer, background=background).wait())


def hang_at_the_end(folder: Path) -> list[str]:
    """What is said of a save in which rank 0 hangs in the last step, and of the next one while it hangs."""
    model, optimizer = sharded()
    mics.save(folder / "step-1", model, optimizer)
    said = []

    def twice() -> None:
        for step in (2, 3):
            try:
                mics.save(folder / f"step-{step}", model, optimizer)
            except (RuntimeError, ValueError) as error:
                said.append(str(error))

    said_where(0, "hangs", Manifest, "render", twice)
    return said


def load(folder: Path, how: str) -> tuple[str, str]:
    """What is said of a load in which rank 1 hangs, or goes on slowly, in a thread that reads for another one; and of a
    forward of rank 1 while it hangs.
    """
    model, optimizer = sharded()
    mics.save(folder / "step-1", model, optimizer)
    refused = ""

    def job() -> None:
        nonlocal refused
        try:
            mics.load(folder, model, optimizer)
        except RuntimeError:
            if dist.get_rank() == 1:
                try:
                    model(torch.ones(1, 40))
                except mics.LifecycleError as error:
                    refused = str(error)
            raise

    lifecycle = registry.runtime_of(model, "test").lifecycle

    def writes() -> bool:
        return lifecycle.phase is Phase.LOADING

    return said_where(1, how, reading.FileSystemReader, "read_data", job, writes), refused


def stay_away() -> str:
    """What ranks say to which rank 1 tells nothing."""
    mics.init(timeout=timedelta(seconds=2))  # of the group that is made now
    world = World(None)
    world.all_gather_object(None, "test")  # while gloo connects ranks it has a timeout of its own
    told = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 1:
        told.wait(["gave up"], timedelta(minutes=5))
        return "rank 1"
    try:
        world.all_gather_object(None, "save")
    except RuntimeError as error:
        told.set("gave up", "")
        return str(error)
    return "nothing"


def save_in_a_part(folder: Path, what: str) -> str:
    """What is said in the group of the ranks 2 and 3 of an optimizer whose last rank has settings of its own."""
    groups = [dist.new_group([first, first + 1]) for first in (0, 2)]
    if dist.get_rank() < 2:
        return ""
    model = mics.shard(nn.Linear(4, 4), mics.Sharding.mics(2), group=groups[1])
    optimizer = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias]}], lr=0.01)
    odd = dist.get_rank() == 3
    if what == "settings" and odd:
        optimizer.param_groups[1]["lr"] *= 2
    try:
        mics.save(folder / "step-1", model, optimizer, keep=0 if what == "keep" and odd else None)
    except ValueError as error:
        return str(error)
    return "nothing"
