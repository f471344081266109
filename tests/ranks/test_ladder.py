"""States move between degrees without losing or mixing up an element, for every chain of degrees."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ladder_work as work
from depth import draws
from ladder_work import Case
from mics_core.spec.sharding import Sharding
from pool import Pool


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Nodes of any size, and any chain of degrees that fills them first."""
    per_node = draw(st.integers(1, 8))
    world = per_node * draw(st.integers(1, 8 // per_node))
    fits = [d for d in divisors(world) if d % per_node == 0 or per_node % d == 0]
    optimizer = draw(st.sampled_from(fits))
    grads = draw(st.sampled_from([d for d in fits if optimizer % d == 0]))
    params = draw(st.sampled_from([d for d in fits if grads % d == 0]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    return Case(world, per_node, Sharding(params, grads, optimizer), draw(st.integers(1, 200)), dtype)


@draws(12, 80)
@given(case=cases())
def test_every_way_up_is_a_sum_and_every_way_down_brings_it_back(pool: Pool, case: Case) -> None:
    for result in pool.run(case.world, work.there_and_back, case):
        assert all(result.values()), result


@draws(8, 40)
@given(case=cases())
def test_several_rungs_at_once_work_in_place(pool: Pool, case: Case) -> None:
    for result in pool.run(case.world, work.straight_down_and_up, case):
        assert all(result.values()), result


@pytest.mark.cpu_ranks  # a job that waits holds a lane's thread, but with a stream the host
def test_units_go_on_inside_nodes_while_another_holds_the_lane_between_them(pool: Pool) -> None:
    case = Case(4, 2, Sharding.ddp().resolve(4), 64)
    assert pool.run(4, work.two_sums_while_the_net_is_busy, case) == [(2, 0, True)] * 4


def test_degrees_need_not_be_powers_of_two(pool: Pool) -> None:
    for case in (Case(6, 3, Sharding(3, 3, 6), 7), Case(6, 2, Sharding(2, 6, 6), 5), Case(5, 5, Sharding(1, 5, 5), 3)):
        for result in pool.run(case.world, work.there_and_back, case):
            assert all(result.values()), (case, result)


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_numbers_are_summed_over_one_copy_and_compared_over_the_replicas(pool: Pool, degree: int) -> None:
    case = Case(8, 2, Sharding(2, 4, 8), 1)
    for rank, (count, total) in enumerate(pool.run(8, work.totals, case, degree)):
        first = rank - rank % degree
        assert (count, total) == (degree, sum(range(first, first + degree)))
    for rank, (rows, ranks) in enumerate(pool.run(8, work.compared, case, degree)):
        assert tuple(rows) == ranks == tuple(range(rank % degree, 8, degree))
