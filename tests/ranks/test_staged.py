"""Ranks that share a device: what travels through the host's memory is what NCCL and gloo would have moved.

The device is a pretended one, whose streams are threads that are late by chance.
"""

import socket

import pytest

import mics_core as mics
import staged_work as work
from mics_core.comm.staged import _OPEN
from pool import Pool

pytestmark = pytest.mark.cpu_ranks  # which pretend a device of their own

FP32, BF16 = mics.Precision.fp32(), mics.Precision.bf16()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_pieces_of_any_size_arrive_in_the_order_of_ranks(pool: Pool, world: int) -> None:
    assert pool.run(world, work.moved, [1, 1000, 16, 4096, 3, 1, 50_000, 2, 2, 2, 7, 64]) == [[]] * world


def test_pinned_memory_is_used_again_and_grows_to_the_largest_transfer(pool: Pool) -> None:
    (_, *slots), _ = pool.run(2, work.pinned_after, [8, 8, 4, 100, 100, 1, 100])
    assert slots == [2 * 8 * 4, 2 * 100 * 4]


def test_a_submit_does_not_wait_for_the_other_ranks(pool: Pool) -> None:
    assert pool.run(2, work.returns_before_the_others_come) == [(True, True)] * 2


@pytest.mark.parametrize(
    ("world", "sharding", "precision"),
    [
        (2, mics.Sharding(2, 2, 2), BF16),
        (4, mics.Sharding(2, 2, 4), FP32),
        pytest.param(4, mics.Sharding(4, 4, 4), BF16, marks=pytest.mark.deep),
        pytest.param(4, mics.Sharding(1, 2, 4), BF16, marks=pytest.mark.deep),
        pytest.param(8, mics.Sharding(2, 2, 8), FP32, marks=pytest.mark.deep),
        pytest.param(8, mics.Sharding(2, 2, 2), BF16, marks=pytest.mark.deep),
    ],
    ids=str,
)
def test_training_gives_the_bits_of_ranks_on_a_cpu(
    pool: Pool, world: int, sharding: mics.Sharding, precision: mics.Precision
) -> None:
    for seed in range(2):
        assert pool.run(world, work.same_as_on_a_cpu, sharding, precision, seed) == [[]] * world


def test_a_failed_transfer_is_told_as_by_ranks_of_a_cpu_and_stops_no_stream(pool: Pool) -> None:
    found, expected = (pool.run(2, work.failing, staged) for staged in (True, False))
    assert found == expected
    assert found[0][0].startswith("gather of layers.0 failed on rank 0: nothing came from rank 9")


def test_a_submit_on_any_lane_raises_what_a_transfer_has_failed_with(pool: Pool) -> None:
    for said in pool.run(2, work.failing_next_submit):
        assert said.startswith("hop 1 of layers.0 failed on rank ")


def test_a_host_that_waits_for_a_device_that_has_failed_raises_what_failed(pool: Pool) -> None:
    for said in pool.run(2, work.failing_device):
        assert "an illegal memory access was encountered" in said


def test_a_rank_that_ends_well_sends_what_others_may_wait_for(pool: Pool) -> None:
    assert pool.run(2, work.ending, False) == [(True, True)] * 2


def test_a_rank_that_ends_by_an_error_sends_nothing_that_its_device_has_not_written(pool: Pool) -> None:
    assert pool.run(2, work.ending, True) == [(False, False)] * 2


def test_no_stream_waits_again_once_a_process_ends(pool: Pool) -> None:
    assert pool.run(2, work.number_after_the_end_began) == [_OPEN] * 2


def test_pages_alone_outlive_a_world_as_streams_may_still_look_at_them(pool: Pool) -> None:
    assert pool.run(2, work.left_of_a_world) == [(False, True)] * 2


def test_auto_gives_ranks_that_share_a_gpu_a_part_of_its_memory(pool: Pool) -> None:
    whole, part = 320_000, 160_000
    alone, shared, apart = (
        pool.run(2, work.automatic, *told) for told in [(whole, False), (whole, True), (part, False)]
    )
    assert shared == apart != alone


def test_init_shares_gpus_out_by_local_rank_and_says_so_once(pool: Pool) -> None:
    found = pool.run(4, work.started, _free_port(), ["a, GPU 0", "a, GPU 1"] * 2)
    assert [device for device, *_ in found] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert {backend for _, backend, _, _ in found} == {"gloo"}
    (said, *others) = [told for _, _, told, _ in found]
    assert said.startswith("init: ranks share GPUs, so what travels goes through the hosts' memory by gloo")
    assert said.count("\n") == 1
    assert not any(others)


def test_init_raises_on_all_ranks_where_only_some_share_a_gpu(pool: Pool) -> None:
    found = pool.run(3, work.started, _free_port(), ["a, GPU 0", "a, GPU 1", "a, GPU 0"])
    (said,) = {error for *_, error in found}
    assert said.startswith("ranks 0 and 2 share a GPU (a, GPU 0), and rank 1 has one of its own (a, GPU 1): ")


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port
