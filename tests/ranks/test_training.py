"""Training with any degrees, nodes and micro-steps is training in one process, and replicas stay replicas."""

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

import training_work as work
from depth import draws, is_deep
from mics_core import Sharding
from placing import Place
from pool import Pool
from training_work import Plan

# How far weights may be from one process's in float32 after 5 steps, each of which moves them by up to 0.05, and norms
# from its, relatively. Several times what was seen; in half precision all is rounded to 8 or 11 bits, and norms most.
TOLERANCES = {
    "fp32": (2e-6, 2e-6),
    "fp16": (1e-3, 4e-3),
    "fp16, float16 gradients": (1e-3, 1e-2),
    "bf16": (5e-3, 4e-2),
    "bf16, int8": (4e-2, 8e-2),
}
# NCCL rounds a sum to 16 bits at every rank that it goes by. Ranks that share GPUs sum as on a CPU.
ON_GPUS = {
    "fp32": (1e-5, 1e-5),
    "fp16": (2e-3, 8e-3),
    "fp16, float16 gradients": (2e-3, 2e-2),
    "bf16": (1e-2, 8e-2),
    "bf16, int8": (4e-2, 8e-2),
}


def tolerances(pool: Pool, world: int, precision: str) -> tuple[float, float]:
    """Of weights and of norms, where so many ranks run."""
    return (ON_GPUS if pool.place(world) is Place.GPU else TOLERANCES)[precision]


@st.composite
def plans(draw: st.DrawFn, largest: int = 8) -> Plan:
    """Nodes of any size, and any chain of degrees that fills them first."""
    per_node = draw(st.integers(1, largest))
    world = per_node * draw(st.integers(1, largest // per_node))
    fits = [d for d in range(1, world + 1) if world % d == 0 and (d % per_node == 0 or per_node % d == 0)]
    optimizer = draw(st.sampled_from(fits))
    grads = draw(st.sampled_from([d for d in fits if optimizer % d == 0]))
    params = draw(st.sampled_from([d for d in fits if grads % d == 0]))
    return Plan(world, per_node, Sharding(params, grads, optimizer), draw(st.integers(1, 4)), draw(st.booleans()))


@draws(12, 60)
@given(plan=plans(), widths=st.lists(st.integers(1, 12), min_size=2, max_size=4), rows=st.integers(1, 3))
def test_gradients_of_whole_numbers_are_those_of_one_process_bit_for_bit(
    pool: Pool, plan: Plan, widths: list[int], rows: int
) -> None:
    for differing in pool.run(plan.world, work.exact, plan, widths, rows):
        assert not differing


@pytest.mark.parametrize("kind", work.MODELS)
@draws(2, 20)
@given(
    plan=plans(),
    optimizer=st.sampled_from(["mics.AdamW", "AdamW", "SGD"]),
    precision=st.sampled_from(sorted(work.PRECISIONS)),
    max_norm=st.sampled_from([None, 0.5, 100.0]),
)
def test_five_steps_are_those_of_one_process(
    pool: Pool, kind: str, plan: Plan, optimizer: str, precision: str, max_norm: float | None
) -> None:
    """After each of them all ranks of a replication group hold the same bytes."""
    near, norm_near = tolerances(pool, plan.world, precision)
    for weights, norm in pool.run(plan.world, work.train, plan, kind, optimizer, precision, max_norm):
        assert norm <= norm_near
        assert not {name: far for name, far in weights.items() if not far <= near}


LATE = [((2, 2, 4), "bf16, int8"), ((1, 1, 1), "bf16"), ((4, 4, 4), "fp32")]
if is_deep():
    LATE = [(each, kind) for each in [(2, 2, 4), (1, 1, 1), (4, 4, 4), (1, 2, 4), (2, 2, 2)] for kind in TOLERANCES]


@pytest.mark.cpu_ranks  # whose lanes are threads; tests/order has the same of streams
@pytest.mark.parametrize(("degrees", "precision"), LATE, ids=str)
def test_late_lanes_change_no_number(pool: Pool, degrees: tuple[int, int, int], precision: str) -> None:
    words = ("gather", "hop", "sync", "slow", "inside", "between", "questions")
    plan = Plan(4, 2, Sharding(*degrees), 2, marked=True)
    assert pool.run(4, work.differing_if_late, plan, work.PRECISIONS[precision], words) == [([], [])] * 4


@pytest.mark.parametrize("degrees", [(4, 4, 4), (2, 2, 4), (1, 1, 1)], ids=str)
def test_sums_in_float16_are_divided_once(pool: Pool, degrees: tuple[int, int, int]) -> None:
    """The division comes before the sum there, which would leave float16's range."""
    plan, kind = Plan(4, 2, Sharding(*degrees), 2, marked=True), "fp16, float16 gradients"
    near, norm_near = tolerances(pool, 4, kind)
    for weights, norm in pool.run(4, work.train, plan, "Mlp", "SGD", kind, 100.0):
        assert norm <= norm_near
        assert not {name: far for name, far in weights.items() if not far <= near}


def test_every_rank_counts_the_steps_of_every_parameter_also_where_it_has_no_part_of_one(pool: Pool) -> None:
    for counted in pool.run(4, work.steps_counted, Sharding.mics(4)):
        assert set(counted.values()) == {2.0}


@pytest.mark.parametrize(
    ("degrees", "per_node"), [((1, 1, 1), 2), ((2, 2, 2), 2), ((1, 2, 4), 4), ((2, 2, 4), 2), ((1, 1, 2), 1)], ids=str
)
def test_ranks_that_hold_the_same_piece_hold_the_same_bytes(
    pool: Pool, degrees: tuple[int, int, int], per_node: int
) -> None:
    copies: dict[tuple[int, str], list[bytes]] = defaultdict(list)
    for held in pool.run(4, work.replicas, Sharding(*degrees), per_node):
        for piece, state, content in held:
            copies[piece, state].append(content)
    for (piece, state), contents in copies.items():
        degree = degrees[0] if state.startswith("shard") else degrees[2]
        assert len(contents) == 4 // degree
        assert len(set(contents)) == 1, f"piece {piece} of the {state}"


@pytest.mark.parametrize(
    ("state", "culprit", "sentence"),
    [
        ("shard", 2, "the shard of blocks.1 on ranks [2] and on rank 0 differ"),
        ("shard", 3, "the shard of blocks.1 on ranks [3] and on rank 1 differ"),
        ("master", 3, "the master of blocks.1 on ranks [3] and on rank 1 differ"),
    ],
)
def test_a_flipped_bit_is_found_on_every_rank(pool: Pool, state: str, culprit: int, sentence: str) -> None:
    for error in pool.errors(4, work.corrupt, Sharding.mics(2), state, culprit):
        assert type(error) is RuntimeError
        assert f"check_replicas: {sentence}, expected the same bits" in str(error)


def test_what_users_wrote_into_parameters_is_used_and_no_difference_between_replicas(pool: Pool) -> None:
    assert pool.run(2, work.clamped) == [True, True]


def test_nothing_is_gathered_while_the_optimizer_writes_though_a_loop_was_left_early(pool: Pool) -> None:
    assert pool.run(2, work.under_way_after_a_loop_was_left) == [[], []]


def test_a_load_replaces_what_was_gathered_ahead_though_a_loop_was_left_early(pool: Pool) -> None:
    for after, fresh in pool.run(2, work.loads_after_a_loop_was_left):
        assert after == fresh
