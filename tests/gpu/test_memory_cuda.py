"""Memory as a GPU's allocator counts it: the predicted peak, for the models of the CPU test, and what is beside it."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mics_core as mics
from mics_core.checkpoint import host_memory
from mics_core.fingerprint import fingerprint
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


def test_a_fingerprint_takes_a_fraction_of_the_tensors_memory() -> None:
    tensor = torch.ones(1 << 28, device="cuda")
    fingerprint(tensor[:8])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    fingerprint(tensor)
    assert torch.cuda.max_memory_allocated() - held < tensor.nbytes / 2


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_background_save_pins_what_it_copies_and_no_more() -> None:
    """torch's own pinned memory would be 2 GiB here."""

    class Runtime(SimpleNamespace):
        __hash__ = object.__hash__

    runtime: Any = Runtime(world=SimpleNamespace(device=torch.device("cuda", torch.cuda.current_device())))
    part = torch.randint(256, (int(1.1 * 2**30),), dtype=torch.uint8, device="cuda")
    host_memory.copies(runtime, [part[:8]])
    before = resident()
    (copy,) = host_memory.copies(runtime, [part])
    assert copy.is_pinned()
    assert resident() - before < 1.2 * part.nbytes
    assert torch.equal(copy, part.cpu())
    del copy, runtime
    assert resident() - before < 0.1 * part.nbytes, "it is let go of with the model"
