"""The predicted peak of memory is the one that ranks measure, within 5 %."""

from dataclasses import replace
from functools import cache

import pytest

import memory_work as work
from mics_core import Cluster, Precision, Sharding
from mics_core.planner import Candidate, Link, Memory, Transport, Workload, memory, trace
from placing import Place
from pool import Pool

WHOLE, GROUPS, WIDE = Sharding(1, 1, 1), Sharding(2, 2, 2), Sharding(2, 2, 4)
CPUS = Cluster(
    "four CPU ranks",
    2,
    2,
    1 << 30,
    {"float32": 1e10, "bfloat16": 1e10},
    1e10,
    Link(1e9, 1e-4),
    Link(1e8, 1e-3),
    0.5,
    transport=Transport.GLOO,
)


@cache
def traced(kind: str, *, own: bool, precision: Precision) -> Workload:
    """With the model's own checkpointing, or without."""
    return trace(work.build(kind, checkpoint=own), work.batch(1), precision=precision, ranks=4)


def predicted(
    kind: str, sharding: Sharding, *, own: bool, recompute: bool, precision: Precision, cluster: Cluster = CPUS
) -> Memory:
    """By the model's own checkpointing, or by what the planner supposes of it."""
    candidate = Candidate(sharding, precision, work.ROWS, work.MICRO_STEPS, recompute)
    return memory(traced(kind, own=own, precision=precision), candidate, cluster)


@pytest.mark.parametrize(
    ("kind", "checkpoint", "precision"),
    [
        pytest.param("gpt", True, Precision.bf16()),
        pytest.param("bert", False, Precision.fp32(), marks=pytest.mark.deep),
        pytest.param("gpt", False, Precision.fp32(), marks=pytest.mark.deep),
        pytest.param("bert", False, Precision.bf16(), marks=pytest.mark.deep),
        pytest.param("bert", True, Precision.fp32(), marks=pytest.mark.deep),
    ],
    ids=["gpt recomputed bf16", "bert kept fp32", "gpt kept fp32", "bert kept bf16", "bert recomputed fp32"],
)
def test_the_peak_of_a_step_is_predicted_within_5_percent(
    pool: Pool, kind: str, checkpoint: bool, precision: Precision
) -> None:
    shardings = [GROUPS if checkpoint else WHOLE, WIDE]
    ranks = pool.run(4, work.peaks, kind, checkpoint, shardings, precision)
    cluster = replace(CPUS, transport=Transport.NCCL) if pool.place(4) is Place.GPU else CPUS
    for number, sharding in enumerate(shardings):
        parts = predicted(kind, sharding, own=False, recompute=checkpoint, precision=precision, cluster=cluster)
        for measured in ranks:
            assert parts.total == pytest.approx(measured[number], rel=0.05), (sharding, parts)


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_a_model_that_recomputes_its_blocks_is_predicted_like_one_that_is_said_to(kind: str) -> None:
    told = predicted(kind, GROUPS, own=False, recompute=True, precision=Precision.fp32())
    own = predicted(kind, GROUPS, own=True, recompute=False, precision=Precision.fp32())
    assert own.total == pytest.approx(told.total, rel=0.01)


def test_more_prefetch_and_less_cutting_take_more_memory() -> None:
    workload = traced("gpt", own=False, precision=Precision.fp32())
    totals = [
        memory(workload, Candidate(sharding, Precision.fp32(), 1, 1, prefetch_units=ahead), CPUS).total
        for sharding, ahead in ((Sharding(4, 4, 4), 0), (Sharding(4, 4, 4), 1), (Sharding(2, 4, 4), 1))
    ]
    assert totals == sorted(totals)
    assert totals[0] < totals[1] < totals[2]
