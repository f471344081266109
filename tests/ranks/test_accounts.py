"""What the runtime sends, moves and holds is what formulas say, to the byte."""

import itertools

import pytest
import torch

import runtime_work as work
from depth import is_deep
from mics_core import Precision, Sharding
from pool import Pool

# core/test_many_ranks.py shows the same for a rank of 64 whose messages go nowhere; here they arrive.
CHAINS = [Sharding(2, 2, 4), Sharding(1, 2, 8), Sharding(8, 8, 8), Sharding(1, 1, 1)]
if is_deep():
    CHAINS = [Sharding(p, g, o) for p, g, o in itertools.product((1, 2, 4, 8), repeat=3) if g % p == 0 and o % g == 0]
deep = pytest.mark.deep


@pytest.mark.parametrize(
    ("per_node", "marked", "blocks"),
    [
        pytest.param(2, True, 3),
        pytest.param(2, False, 3, marks=deep),
        pytest.param(1, True, 1, marks=deep),
        pytest.param(8, True, 1, marks=deep),
    ],
    ids=str,
)
def test_calls_and_bytes_on_every_level_equal_the_formula(pool: Pool, per_node: int, marked: bool, blocks: int) -> None:
    for rank in pool.run(8, work.accounts, CHAINS, per_node, Precision.bf16(), 3, marked, blocks):
        for account in rank:
            assert account.counted == account.predicted, account.sharding


EIGHT_BITS = [
    Precision.bf16(between_nodes=torch.int8),
    Precision(torch.float16, between_nodes=torch.float8_e4m3fn, hop1_between_nodes=torch.int8),
]


@pytest.mark.parametrize("precision", EIGHT_BITS if is_deep() else EIGHT_BITS[1:], ids=str)
def test_bytes_of_eight_bits_equal_the_formula_scales_and_exact_vectors_included(
    pool: Pool, precision: Precision
) -> None:
    for rank in pool.run(8, work.accounts, [*CHAINS, Sharding(2, 8, 8)], 2, precision, 2, True, 2):
        for account in rank:
            assert account.counted == account.predicted, account.sharding
            kept, expected = account.parcels
            assert kept == expected, account.sharding


@pytest.mark.parametrize(("reduce", "most"), [(torch.bfloat16, 25), (torch.float32, 34)], ids=str)
def test_local_copies_move_few_bytes_per_parameter_and_step(pool: Pool, reduce: torch.dtype, most: float) -> None:
    """8 ranks to a copy, 4 micro-steps, mixed precision, where FSDP2 moves 77.

    Sums of what peers sent are counted apart, as "reduction": NCCL does them inside its collective.
    """
    for (account,) in pool.run(8, work.accounts, [Sharding.mics(8)], 8, Precision.bf16(reduce), 4, True, 3):
        moved = {name: count for name, count in account.memory.items() if name != "reduction"}
        assert set(moved) == {"pack", "accumulate", "adamw"}
        assert sum(moved.values()) <= most
        # 4 times a bf16 gradient in, a wire gradient out; the sum of 8 ranks in fp32, first written, then added to.
        wire = reduce.itemsize
        assert moved["pack"] == 4 * (2 + wire)
        assert moved["accumulate"] == (4 * wire + 4 + 3 * 8) / 8
        assert moved["adamw"] == (16 + 12 + 2) / 8


@pytest.mark.parametrize(
    ("sharding", "precision"),
    [
        pytest.param(Sharding(1, 1, 1), Precision.fp32()),
        pytest.param(Sharding(2, 2, 4), Precision.bf16(between_nodes=torch.int8)),
        pytest.param(Sharding(2, 4, 4), Precision.bf16(between_nodes=torch.int8), marks=deep),
        pytest.param(Sharding(2, 2, 4), Precision.bf16(), marks=deep),
        pytest.param(Sharding(1, 1, 1), Precision.bf16(), marks=deep),
        pytest.param(Sharding(2, 2, 4), Precision.fp32(), marks=deep),
        *[pytest.param(Sharding.mics(2), precision, marks=deep) for precision in (Precision.fp32(), Precision.bf16())],
        *[pytest.param(Sharding.mics(4), precision, marks=deep) for precision in (Precision.fp32(), Precision.bf16())],
    ],
    ids=str,
)
def test_memory_is_a_formula_and_flat_from_the_third_step(pool: Pool, sharding: Sharding, precision: Precision) -> None:
    for held in pool.run(4, work.memory, sharding, precision):
        assert [found for found, _ in held] == [expected for _, expected in held]


PLAYED = [Sharding(2, 2, 4), Sharding(1, 1, 2), Sharding(4, 4, 4)]


@pytest.mark.cpu_ranks  # a recording is of the CPU, whose tensors it makes
@pytest.mark.parametrize("sharding", PLAYED, ids=str)
def test_a_recording_hands_to_lanes_what_ranks_do(pool: Pool, sharding: Sharding) -> None:
    for real, recorded in pool.run(4, work.handed_to_lanes, sharding, LOCAL_WORLD_SIZE=2):
        assert real == recorded


@pytest.mark.parametrize("budget", [0, None, 1 << 20], ids=["none", "one unit", "all"])
def test_gathered_memory_stays_within_the_budget(pool: Pool, budget: int | None) -> None:
    for peak, (root, *blocks), allowed in pool.run(4, work.gathered, Sharding(4, 4, 4), budget):
        # The root and the unit at work, besides what is fetched ahead.
        assert peak <= root + max(blocks) + allowed
        if budget is None:
            assert peak == root + 2 * max(blocks)
        if budget == 1 << 20:
            assert peak == root + sum(blocks)
