"""What a step asks of a GPU for each unit: kernels, collectives, events and other operators of torch, counted.

Each costs the host some microseconds, and nobody sees one more in a time. Where a change saves some, lower the number.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import mics_core as mics
from mics_core.comm import recorded
from mics_core.comm.recorded import Kind, RecordedWorld
from training import WIDTH, Model

STEPS, MICRO_STEPS, RANKS, RANK, BLOCKS, MORE = 2, 2, 8, 3, 4, 4
KINDS = {Kind.MEMORY: "kernels", Kind.SEND: "collectives", Kind.RECORD: "events", Kind.WAIT: "waits"}
MOST = {
    mics.Sharding(1, 1, 1): {"kernels": 8, "collectives": 4, "events": 12, "waits": 16, "operators": 0},
    mics.Sharding(2, 2, 8): {"kernels": 8, "collectives": 8, "events": 18, "waits": 25, "operators": 0},
    mics.Sharding(8, 8, 8): {"kernels": 6, "collectives": 12, "events": 24, "waits": 27, "operators": 0},
}
"""In a step of two micro-steps, with the clip and the optimizer; collectives are counted for each level."""


class Operators(TorchDispatchMode):
    """Counts those that one runtime asks for itself; views and new memory launch nothing."""

    def __init__(self, owner: str, *others: str) -> None:
        super().__init__()
        self.count = 0
        self._owner = owner
        self._others = (*others, str(sys.modules[Model.__module__].__file__))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _memories((args, kwargs))
        result = func(*args, **(kwargs or {}))
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if writes or ("empty" not in func._schema.name and not _memories(result) <= given):
            self.count += self._asks()
        return result

    def _asks(self) -> bool:
        """Whether the nearest caller of those that are known is the runtime."""
        frame = sys._getframe(2)
        while frame is not None:
            path = frame.f_code.co_filename
            if any(other in path for other in self._others):
                return False
            if self._owner in path:
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False


def _memories(tree: Any) -> set[int]:
    return {t.untyped_storage()._cdata for t in tree_flatten(tree)[0] if type(t) is torch.Tensor}


def of_a_unit(counted: Callable[[int], Counter[str]]) -> dict[str, float]:
    """What a block more costs in a step."""
    few, many = counted(BLOCKS), counted(BLOCKS + MORE)
    return {name: (number - few[name]) / (MORE * STEPS) for name, number in many.items()}


def ours(sharding: mics.Sharding, blocks: int) -> Counter[str]:
    world = RecordedWorld(RANKS, RANK)
    model = mics.shard(Model(blocks), sharding, ranks_per_node=2, precision=mics.Precision.bf16(), group=world)
    optimizer = mics.AdamW(model.parameters())
    batches = list(torch.randn(MICRO_STEPS, 3, WIDTH))

    def steps() -> None:
        for _ in range(STEPS):
            for batch in mics.accumulate(model, batches):
                model(batch).backward()
            mics.clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    steps()
    begin = len(world.program.entries)
    with Operators("mics_core", "mics_kernels", recorded.__file__) as operators:
        steps()
    found = Counter(KINDS[entry.kind] for entry in world.program.entries[begin:] if entry.kind in KINDS)
    found["operators"] = operators.count
    return found


def fsdp2(degree: int, blocks: int) -> Counter[str]:
    """Its passes alone, without clip and optimizer; collectives are not counted."""
    shape = (RANKS,) if degree == RANKS else (RANKS // degree, degree)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    model = Model(blocks)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    batches = torch.randn(MICRO_STEPS, 3, WIDTH)

    def steps() -> None:
        for _ in range(STEPS):
            for number, batch in enumerate(batches, 1):
                model.set_requires_all_reduce(number == MICRO_STEPS)  # type: ignore[operator]
                model(batch).backward()
            model.zero_grad()

    steps()
    with Operators("/fsdp/") as operators:
        steps()
    return Counter(operators=operators.count)


@contextmanager
def pretended_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("sharding", MOST, ids=str)
def test_a_unit_takes_no_more_launches_than_before(sharding: mics.Sharding) -> None:
    found = of_a_unit(lambda blocks: ours(sharding, blocks))
    assert {name: number for name, number in found.items() if number > MOST[sharding][name]} == {}


@pytest.mark.parametrize("degree", [2, 8])
def test_a_unit_takes_fewer_kernels_than_fsdp2s(degree: int) -> None:
    found = of_a_unit(lambda blocks: ours(mics.Sharding.mics(degree), blocks))
    with pretended_ranks():
        theirs = of_a_unit(lambda blocks: fsdp2(degree, blocks))
    assert found["kernels"] + found["operators"] < theirs["operators"]
