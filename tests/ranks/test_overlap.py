"""Transfers that could be hidden behind the computation are: on a link that a test slows down."""

import runtime_work as work
from mics_core import Sharding
from pool import Pool

BLOCKS = 6  # of runtime_work.timed


def hidden(times: list[tuple[float, float]], transfers: float, hideable: float) -> float:
    """The share of what can be hidden that did not show in the time of a step."""
    slow, fast = max(slow for slow, _ in times), max(fast for _, fast in times)
    return (transfers - (slow - fast)) / hideable


def test_prefetch_hides_the_gathers_behind_the_computation(pool: Pool) -> None:
    compute, transfer = 0.04, 0.03
    times = pool.run(2, work.timed, Sharding(2, 2, 2), compute, transfer, "gather")
    # Each unit is gathered for forward and backward, the last and the root once. Nothing comes before the root, and
    # only the root's little before the first unit.
    gathers = 2 * BLOCKS - 1 + 1
    assert hidden(times, gathers * transfer, (gathers - 2) * transfer) >= 0.8


def test_the_last_backward_hides_what_goes_between_replicas(pool: Pool) -> None:
    compute, transfer = 0.04, 0.03
    times = pool.run(2, work.timed, Sharding(1, 1, 2), compute, transfer, "hop 2")
    # Those of the first block and the root end the backward: nothing is left to hide them.
    assert hidden(times, (BLOCKS + 1) * transfer, (BLOCKS - 1) * transfer) >= 0.8


def test_the_next_forward_hides_the_refresh(pool: Pool) -> None:
    compute, transfer = 0.04, 0.03
    times = pool.run(2, work.timed_refresh, Sharding(1, 1, 2), compute, transfer)
    # The root and the first block are needed at once.
    assert hidden(times, (BLOCKS + 1) * transfer, (BLOCKS - 1) * transfer) >= 0.8


def test_the_ledger_tells_how_long_the_computation_stood_still(pool: Pool) -> None:
    transfer = 0.03
    for exposed, took, after_reset in pool.run(2, work.stood_still, Sharding(2, 2, 2), transfer):
        # Nothing computes, so nothing hides the gathers of a step.
        assert (2 * BLOCKS - 1) * transfer < exposed < took
        assert after_reset == 0
