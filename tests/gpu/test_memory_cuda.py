"""The predicted peak of memory beside what a GPU's allocator counts, for the models of the CPU test."""

import sys
from pathlib import Path

import pytest
import torch

import mics_core as mics
from mics_core.planner import Candidate, memory, trace

sys.path.insert(0, str(Path(__file__).parents[1] / "planner"))

import memory_work as work

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_the_peak_of_a_step_is_predicted_within_5_percent(kind: str, checkpoint: bool) -> None:
    precision, rows = mics.Precision.bf16(), 32
    square = torch.ones(8, 8, device="cuda", requires_grad=True)
    (square @ square).sum().backward()  # each thread's cuBLAS takes its own memory once, which is no model's
    del square
    before = torch.cuda.memory_allocated()
    model = mics.shard(work.build(kind, checkpoint=checkpoint), mics.Sharding.ddp(), precision=precision)
    optimizer = mics.AdamW(model.parameters())
    given = {name: tensor.cuda() for name, tensor in work.batch(rows).items()}
    for _ in range(3):
        work.step(model, optimizer, given)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work.step(model, optimizer, given)
    torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated() - before
    workload = trace(work.build(kind, checkpoint=False), work.batch(1), precision=precision, ranks=1)
    candidate = Candidate(mics.Sharding(1, 1, 1), precision, rows, work.MICRO_STEPS, checkpoint)
    predicted = memory(workload, candidate, mics.Cluster.preset("this machine"))
    assert predicted.total == pytest.approx(measured, rel=0.05), predicted
