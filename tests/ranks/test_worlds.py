"""What ranks bring into `shard`, and how they leave: neither may hang or abort."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import mics_core as mics
from mics_core.comm import World
from pool import Pool
from runtime_work import WIDTH, Model

LEAVING = """
import torch, mics_core as mics
mics.init()
model = mics.shard(torch.nn.Linear(1000, 1000), mics.Sharding(1, 1, 2))
optimizer = mics.AdamW(model.parameters())
model(torch.ones(1, 1000)).sum().backward()
optimizer.step()  # and the refresh is on its way
"""


def train_beside_other_groups() -> bool:
    if dist.get_rank() == 0:
        dist.new_group([0], use_local_synchronization=True)
    model = mics.shard(Model(2), mics.Sharding.mics(2))
    model(torch.ones(2, WIDTH)).backward()
    mics.AdamW(model.parameters()).step()
    mics.check_replicas(model)
    return True


def buffers_of_rank_0() -> list[int]:
    model = Model(1)
    model.register_buffer("table", torch.full((3,), dist.get_rank() + 1, dtype=torch.int16))
    return mics.shard(model, mics.Sharding.mics(2)).table.tolist()  # type: ignore[no-any-return, operator, union-attr]


def ask_twice_at_once(size: int) -> list[list[int]]:
    """Of a group of the first ranks: two questions under way, answered in any order."""
    group = dist.new_group(list(range(size)))
    if dist.get_rank() >= size:
        return []
    world = World(group)
    rank = dist.get_rank()
    first = world.ask([rank, size - rank, 7 * (rank == size // 2)], "one")
    second = world.ask([(1 + rank) * (place == rank) for place in range(size)], "another")
    return [second.read(), first.read()]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_every_rank_hears_the_largest_answer_of_any(pool: Pool, size: int) -> None:
    expected = [list(range(1, size + 1)), [size - 1, size, 7]]
    assert pool.run(8, ask_twice_at_once, size) == [expected] * size + [[]] * (8 - size)


def test_ranks_that_are_in_different_numbers_of_groups(pool: Pool) -> None:
    assert all(pool.run(4, train_beside_other_groups))


def test_buffers_of_any_dtype_become_those_of_rank_0(pool: Pool) -> None:
    assert pool.run(2, buffers_of_rank_0) == [[1, 1, 1]] * 2


@pytest.mark.deep
def test_leaving_while_a_transfer_is_under_way_is_no_abort(tmp_path: Path) -> None:
    script = tmp_path / "leaving.py"
    script.write_text(LEAVING)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
