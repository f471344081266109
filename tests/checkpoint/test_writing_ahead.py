"""A file goes to the disk while it is written, from memory that background saves keep."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mics_core as mics
from mics_core import registry
from mics_core.checkpoint import host_memory, writing


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_AHEAD", 1)


def sharded(width: int = 8) -> nn.Module:
    return mics.shard(nn.Linear(width, width), mics.Sharding.ddp())


def test_bytes_reach_the_disk_before_all_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, sizes, begun = writing._Measured._give, [], threading.Event()

    def sync(file: int) -> None:
        sizes.append(os.fstat(file).st_size)
        begun.set()

    def give(self: writing._Measured, piece: memoryview) -> None:
        real(self, piece)
        assert self._latest is None or begun.wait(600)  # else the disk may begin when all is written

    monkeypatch.setattr(os, "fdatasync", sync)
    monkeypatch.setattr(writing._Measured, "_give", give)
    monkeypatch.setattr(writing, "_AHEAD", 1 << 16)
    model = mics.shard(nn.Linear(512, 1024), mics.Sharding.ddp())
    mics.save(tmp_path / "step-1", model, None)
    (whole,) = (path.stat().st_size for path in (tmp_path / "step-1").glob("*.distcp"))
    assert sizes
    assert 0 < min(sizes) < whole


def test_an_error_of_an_early_sync_is_raised_though_the_last_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def sync(_: int) -> None:
        if not failed.is_set():
            failed.set()
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", sync)
    with pytest.raises(
        RuntimeError, match=r"step-1.saving/__0_0.distcp cannot be written: Input/output error"
    ) as caught:
        mics.save(tmp_path / "step-1", sharded(), None)
    assert caught.value.__cause__ is None  # a sentence, not two tracebacks
    assert caught.value.__suppress_context__
    assert not (tmp_path / "step-1").exists()


def test_a_process_that_ends_lets_its_last_save_end(tmp_path: Path) -> None:
    program = (
        "import sys, mics_core as mics; from torch import nn; "
        "model = mics.shard(nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(8)]), mics.Sharding.ddp()); "
        "mics.save(sys.argv[1], model, None, background=True)"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path / "step-1")], check=False, stderr=subprocess.PIPE)
    assert (tmp_path / "step-1" / "manifest.json").is_file(), run.stderr.decode()


def test_no_call_brings_much_more_to_the_disk_than_ranks_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_AHEAD", 1 << 16)
    monkeypatch.setattr(writing, "_BEHIND", 1 << 17)
    sizes = [0]

    def sync(file: int) -> None:
        time.sleep(0.01)  # slower than the memory that is written to
        sizes.append(os.fstat(file).st_size)

    monkeypatch.setattr(os, "fdatasync", sync)
    mics.save(tmp_path / "step-1", mics.shard(nn.Linear(512, 1024), mics.Sharding.ddp()), None)
    (whole,) = (path.stat().st_size for path in (tmp_path / "step-1").glob("*.distcp"))
    assert max(after - before for before, after in pairwise([*sizes, whole])) <= 1 << 18


def test_background_saves_copy_to_the_same_memory_which_grows_with_what_is_saved(tmp_path: Path) -> None:
    model = sharded()
    optimizer = mics.AdamW(model.parameters())

    def save(number: int, optimizer: torch.optim.Optimizer | None) -> Tensor:
        mics.save(tmp_path / f"step-{number}", model, optimizer, background=True).wait()
        return host_memory._held[registry.runtime_of(model, "test")]

    first = save(1, None)
    assert save(2, None) is first
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    larger = save(3, optimizer)
    assert larger.numel() >= 2 * first.numel()
    assert save(4, optimizer) is larger
    assert save(5, None) is larger
    mics.load(tmp_path / "step-4", model, optimizer)


def test_the_memory_of_copies_goes_with_the_model(tmp_path: Path) -> None:
    model = sharded()
    before = len(host_memory._held)
    mics.save(tmp_path / "step-1", model, None, background=True).wait()
    assert len(host_memory._held) == before + 1
    del model
    gc.collect()
    assert len(host_memory._held) <= before
