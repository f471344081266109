"""Transfers are under way while units compute: each waits for the other, so one after the other they would hang."""

import pytest

import runtime_work as work
from mics_core import Sharding
from pool import Pool

pytestmark = pytest.mark.cpu_ranks  # a transfer waits on a thread of its own, which a stream has not

LAST = 5  # of the blocks of runtime_work.meet


def test_a_unit_is_gathered_while_the_one_before_it_computes(pool: Pool) -> None:
    # The last block is kept from its forward to its backward, so the others are gathered twice.
    forward = {("forward", block): (f"gather of blocks.{block + 1}", 0) for block in range(LAST)}
    backward = {("backward", block): (f"gather of blocks.{block - 1}", 1) for block in range(LAST, 0, -1)}
    pairs = forward | backward
    assert pool.run(2, work.meet, Sharding(2, 2, 2), pairs) == [list(pairs.values())] * 2


def test_a_gradient_is_summed_over_a_copy_while_the_backward_goes_on(pool: Pool) -> None:
    pairs = {("backward", block): (f"hop 1 of blocks.{block + 1}", 0) for block in range(LAST)}
    assert pool.run(2, work.meet, Sharding(2, 2, 2), pairs) == [list(pairs.values())] * 2


def test_a_gradient_goes_between_replicas_while_the_backward_goes_on(pool: Pool) -> None:
    pairs = {("backward", block): (f"hop 2 of blocks.{block + 1}", 0) for block in range(LAST)}
    assert pool.run(2, work.meet, Sharding(1, 1, 2), pairs) == [list(pairs.values())] * 2


def test_new_weights_travel_while_the_next_forward_computes(pool: Pool) -> None:
    pairs = {("forward", block): (f"refresh of blocks.{block + 1}", 0) for block in range(LAST)}
    assert pool.run(2, work.meet, Sharding(1, 1, 2), pairs) == [list(pairs.values())] * 2
