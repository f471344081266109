"""What ranks bring into `shard`, and how they leave: neither may hang or abort."""

import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import mics_core as mics
from mics_core.comm import world as comm
from mics_core.comm.world import World
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

RESTARTED = """
import os, pathlib, sys, time, torch, mics_core as mics
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1" and os.environ["RANK"] == "0":
    time.sleep(3)  # so that rank 1 looks for it where it was
mics.init()
rank, folder = torch.distributed.get_rank(), pathlib.Path(sys.argv[1])
model = mics.shard(torch.nn.Linear(10, 10), mics.Sharding(1, 1, 2))
optimizer = mics.AdamW(model.parameters())
first = mics.load(folder, model, optimizer)["step"] if (folder / "latest").exists() else 0
for step in range(first, 4):
    if step == 2 and rank == 1 and not first:
        raise ValueError("no such luck")
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    mics.save(folder / f"step-{step + 1}", model, optimizer, step=step + 1)
(folder / f"rank {rank}").write_text(f"from {first} to {step + 1}")
"""


def train_beside_other_groups() -> bool:
    if dist.get_rank() == 0:
        dist.new_group([0], use_local_synchronization=True)
    model = mics.shard(Model(2), mics.Sharding.mics(2))
    model(torch.ones(2, WIDTH)).backward()
    mics.AdamW(model.parameters()).step()
    mics.check_replicas(model)
    return True


def train_in_pairs_of_a_bound_world() -> None:
    pairs = [dist.new_group([first, first + 1]) for first in (0, 2)]
    default = dist.distributed_c10d._get_default_group()
    default.bound_device_id = torch.device("cuda", 0)
    try:
        mics.shard(torch.nn.Linear(4, 4), mics.Sharding.ddp(), group=pairs[dist.get_rank() // 2])
    finally:
        default.bound_device_id = None


def train_where_groups_are_sorted(order: list[int]) -> bool:
    """As with torch 2.11, which sorts the ranks of every group."""
    group = dist.new_group(order, **comm._AS_LISTED)
    with patch.object(comm, "_AS_LISTED", {}):
        model = mics.shard(Model(2), mics.Sharding(2, 2, 4), ranks_per_node=2, group=group)
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
    first = world.max_async([rank, size - rank, 7 * (rank == size // 2)], "one")
    second = world.max_async([(1 + rank) * (place == rank) for place in range(size)], "another")
    return [second.read(), first.read()]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_every_rank_hears_the_largest_answer_of_any(pool: Pool, size: int) -> None:
    expected = [list(range(1, size + 1)), [size - 1, size, 7]]
    assert pool.run(8, ask_twice_at_once, size) == [expected] * size + [[]] * (8 - size)


def test_a_torch_that_sorts_groups_trains_and_takes_no_group_in_another_order(pool: Pool) -> None:
    assert all(pool.run(4, train_where_groups_are_sorted, [0, 1, 2, 3]))
    if not comm._AS_LISTED:
        pytest.skip("this torch makes no group in another order")
    for error in pool.errors(4, train_where_groups_are_sorted, [1, 0, 2, 3]):
        assert isinstance(error, mics.ConfigError)
        assert "expected them in ascending order by this version of torch" in str(error)


def test_a_group_of_some_ranks_is_refused_where_torch_makes_groups_on_all(pool: Pool) -> None:
    for error in pool.errors(4, train_in_pairs_of_a_bound_world):
        assert isinstance(error, mics.ConfigError)
        assert "the group has 2 of 4 ranks, and the default process group is bound to cuda:0" in str(error)


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


@pytest.mark.deep
def test_ranks_that_torchrun_starts_again_meet_and_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    """They meet at the store where the ranks before them, of which one raised, have left what was true for them."""
    program = tmp_path / "program.py"
    program.write_text(RESTARTED)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    started = [sys.executable, *torchrun, str(program), str(tmp_path)]
    done = subprocess.run(started, stderr=subprocess.PIPE, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "no such luck" in done.stderr
    assert [(tmp_path / f"rank {rank}").read_text() for rank in range(2)] == ["from 2 to 4"] * 2
