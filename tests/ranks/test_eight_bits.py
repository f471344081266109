"""Eight bits between nodes: sums are as near as is said, replicas stay replicas, and what must be exact is."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eight_bits_work as work
from depth import draws
from eight_bits_work import Form
from mics_core import Precision, Sharding
from mics_core.spec.topology import Rungs, Scope, Topology
from pool import Pool
from test_training import plans
from training_work import Plan

# Half of the largest step between neighbours, in units of the largest value: of int8, and of fp8 with 3 and 2 bits.
HALF_STEP = {torch.int8: 0.5 / 127, torch.float8_e4m3fn: 16 / 448, torch.float8_e5m2: 4096 / 57344}

shapes = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.tuples(st.integers(1, 300)), min_size=1, max_size=5
)


def roundings(plan: Plan, form: Form) -> int:
    """How often a contribution is rounded: once for each level between nodes, once more on the way down."""
    rungs = Rungs.of(plan.sharding, Topology(plan.world, plan.per_node))
    between = [level for level in rungs.levels(1, plan.world) if rungs.scope(level) is Scope.INTER]
    up = [level for level in between if form.hop1 or rungs.degrees[level] >= plan.sharding.grads]
    whole = plan.sharding.grads == plan.world  # no hop 2, and nothing comes down
    down = [level for level in between if not whole and rungs.degrees[level] >= plan.sharding.optimizer]
    return len(up) + bool(down)


@draws(8, 60)
@given(
    plan=plans(),
    shapes=shapes,
    values=st.sampled_from(sorted(HALF_STEP, key=str)),
    reduce=st.sampled_from([torch.float32, torch.bfloat16]),
    hop1=st.booleans(),
)
def test_sums_are_as_near_to_exact_ones_as_their_roundings_allow(
    pool: Pool, plan: Plan, shapes: list[tuple[int, ...]], values: torch.dtype, reduce: torch.dtype, hop1: bool
) -> None:
    """Each rounding is off by half a step of the largest in its block; vectors are as exact as without."""
    form = Form(values, reduce=reduce, hop1=hop1)
    often = roundings(plan, form)
    for rank in pool.run(plan.world, work.means, plan, shapes, form):
        for found, exact, largest in rank:
            wire = 16 * torch.finfo(reduce).eps * largest
            near = wire + (often * HALF_STEP[values] * 1.01 * largest if found.dim() > 1 else 0.0)
            assert (found - exact).abs().max() <= near


@pytest.mark.parametrize("exact", [(), ("p1",), ("p*",)], ids=str)
def test_what_is_named_stays_exact(pool: Pool, exact: tuple[str, ...]) -> None:
    plan = Plan(4, 2, Sharding(2, 2, 4), 1, marked=True)
    shapes = [(30, 20), (30, 20), (50,)]
    named = {"p*": {0, 1, 2}, "p1": {1, 2}}.get("".join(exact), {2})
    for rank in pool.run(4, work.means, plan, shapes, Form(torch.int8, exact=exact)):
        off = {index for index, (mean, true, _) in enumerate(rank) if (mean - true).abs().max() > 1e-5}
        assert off == {0, 1, 2} - named


@pytest.mark.parametrize("degrees", [(2, 2, 4), (1, 4, 4), (1, 1, 4)], ids=str)
def test_weights_follow_their_masters_vectors_exactly_and_all_after_a_write(
    pool: Pool, degrees: tuple[int, int, int]
) -> None:
    assert pool.run(4, work.shown_after_a_write, degrees) == [(True, True, True, False)] * 4


@pytest.mark.parametrize("degrees", [(2, 2, 4), (2, 2, 2), (4, 4, 4)], ids=str)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("values", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_gradient_that_is_not_finite_stays_so(
    pool: Pool, degrees: tuple[int, int, int], bad: float, values: torch.dtype
) -> None:
    precision = Precision(between_nodes=values, hop1_between_nodes=values)
    for norm in pool.run(4, work.norm_of, bad, precision, degrees):
        assert not math.isfinite(norm)
