"""The shortest schedule, on cases worked by hand, and the bytes of the formula on a node's link."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.scenes.limit import UnitTime, bytes_leaving, leaving, limit, uncovered, unit_times
from bench.scenes.model import StandIn
from mics_core.spec.formula import Formula, UnitSize
from mics_core.spec.sharding import Precision, Sharding
from mics_core.spec.topology import Rungs, Topology

TWO = [UnitTime(forward=1, backward=2)] * 2


def with_times(**times: float) -> list[UnitTime]:
    return [UnitTime(forward=1, backward=2, gathers=4, **times)] * 2


@pytest.mark.parametrize(
    ("units", "micro_steps", "steps", "seconds"),
    [
        (TWO, 1, 1, 6),
        (TWO, 3, 5, 18),
        # The unit that is last in the backward ends it: nothing covers its hop 2. The other's hides behind 2 seconds.
        (with_times(hop2=1), 1, 1, 6 + 1),
        (with_times(hop2=1), 4, 1, 24 + 1),
        (with_times(hop2=3), 1, 1, 6 + 2 * 3 - 2),
        # Hop 1 on the link ends a backward likewise; those before it have the next micro-step to hide behind.
        (with_times(hop1=1), 4, 1, 24 + 1),
        # One step: nothing follows that the refresh could hide behind. Many: the first unit's is before its forward.
        (with_times(refresh=1), 1, 1, 6 + 2),
        (with_times(refresh=1), 1, 3, (6 + 2 + 2 * (6 + 1)) / 3),
        (with_times(refresh=3), 1, 2, (6 + 6 + (6 + 2 * 3 - 1)) / 2),
        # The first gather of all is in the way; the others fit between.
        (with_times(gather=0.5), 2, 1, 12 + 0.5),
        # More on the link than the computation can cover: the link's time is the step's.
        (with_times(gather=3, hop2=1), 2, 1, 2 * (4 * 3 + 1)),
        ([UnitTime(hop2=1, refresh=0.5)] * 2, 4, 7, 3),
    ],
)
def test_worked_by_hand(units: list[UnitTime], micro_steps: int, steps: int, seconds: float) -> None:
    assert limit(units, micro_steps, steps) == pytest.approx(seconds)


def test_what_is_not_covered_is_what_the_worst_place_lacks() -> None:
    assert uncovered([1, 5, 1], [2, 2, 2]) == 1 + 5 - 2
    assert uncovered([0, 1, 1], [2, 2, 2]) == 0


times = st.floats(0, 4)
unit = st.builds(UnitTime, times, times, times, st.integers(2, 8), times, times, times)


@settings(deadline=None)
@given(st.lists(unit, min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 4))
def test_it_lies_between_perfect_overlap_and_none(units: list[UnitTime], micro_steps: int, steps: int) -> None:
    compute = micro_steps * sum(u.forward + u.backward for u in units)
    link = sum(u.gathers * u.gather + micro_steps * u.hop1 + u.hop2 + u.refresh for u in units)
    assert max(compute, link) - 1e-9 <= limit(units, micro_steps, steps) <= compute + link + 1e-9


def formula(params: int, grads: int, optimizer: int, per_node: int = 2) -> Formula:
    sharding = Sharding(params, grads, optimizer)
    rungs = Rungs.of(sharding, Topology(8, per_node))
    return Formula(sharding, Precision.fp32(), rungs, UnitSize(0, 0), (UnitSize(800, 0),) * 3)


MODEL = 3 * 800 * 4  # bytes


@pytest.mark.parametrize(
    ("sharding", "per_model"),
    # An all-reduce between 4 nodes: 3/4 up and 3/4 down, wherever on its way the optimizer runs.
    [(formula(2, 2, 4), 1.5), (formula(2, 2, 8), 1.5), (formula(2, 2, 2), 1.5), (formula(1, 1, 1), 1.5)],
)
def test_bytes_that_leave_a_node_do_not_grow_with_micro_steps_of_groups_inside_it(
    sharding: Formula, per_model: float
) -> None:
    assert bytes_leaving(sharding, 2, 1) == bytes_leaving(sharding, 2, 4) == pytest.approx(per_model * MODEL)


def test_a_flat_gather_sends_two_of_three_messages_to_the_other_node() -> None:
    flat, knowing = formula(4, 4, 4, per_node=1), formula(4, 4, 4)
    assert [leaving(flat.rungs, step, 2) for step in range(2)] == [2 / 3, 1.0]
    assert [leaving(knowing.rungs, step, 2) for step in range(3)] == [0.0, 1.0, 1.0]
    # A rank sends its quarter of the unit to both ranks of the other node, or to one, who has its other half.
    (_, one, *_), (_, other, *_) = (unit_times(f, StandIn(), 8.0, 2, 1) for f in (flat, knowing))
    assert one.gather == pytest.approx(2 * other.gather)


def test_times_are_the_formulas_bytes_at_the_rate_of_a_nodes_link() -> None:
    root, first, *_, last = unit_times(formula(4, 4, 4), StandIn(0.1, 0.2), rate_mbit=8.0, per_node=2, micro_steps=4)
    unit_bytes = 800 * 4
    assert root == UnitTime()
    # At 1 MB/s. Both ranks of a node bring a quarter of the unit to the other node.
    assert first.gather == pytest.approx(2 * unit_bytes / 4 * 1e-6)
    assert (first.forward, first.backward) == (0.1, 0.2)
    assert (first.gathers, last.gathers) == (5, 4)  # 8 without those that stay for the next use
    assert first.hop1 == pytest.approx(2 * unit_bytes / 4 * 1e-6)
    assert first.hop2 == pytest.approx(2 * 2 * unit_bytes / 8 * 1e-6)
    assert first.refresh == 0.0
    everything = formula(4, 4, 4)
    total = sum(t.gathers * t.gather + 4 * t.hop1 + t.hop2 for t in unit_times(everything, StandIn(), 8.0, 2, 4))
    assert total == pytest.approx(bytes_leaving(everything, 2, 4) * 1e-6)
