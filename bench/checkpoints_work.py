"""What checkpoints.py runs on every rank: writes and reads of as many bytes, plainly and as checkpoints, in turns."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import mics_core as mics
from bench.harness import order
from bench.ranks import report

WIDTH = 1024
BYTES = 12  # a parameter: master and two moments
ROWS = 64  # of a step
STEPS = 10


def trained(megabytes: float) -> tuple[nn.Module, mics.AdamW, int]:
    """A model cut over all ranks, its optimizer after a step, and the bytes of both on all ranks."""
    layers = max(1, round(megabytes * 1e6 / BYTES / WIDTH**2))
    whole = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    model = mics.shard(whole, mics.Sharding.zero3(), units=[nn.Linear])
    optimizer = mics.AdamW(model.parameters())
    step(model, optimizer, torch.randn(1, WIDTH))
    return model, optimizer, BYTES * layers * WIDTH**2


def step(model: nn.Module, optimizer: mics.AdamW, x: torch.Tensor) -> None:
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def timed(work: Callable[[], object]) -> float:
    """Seconds on the slowest rank."""
    dist.barrier()
    begun = time.perf_counter()
    work()
    passed = torch.tensor(time.perf_counter() - begun, dtype=torch.float64)
    dist.all_reduce(passed, dist.ReduceOp.MAX)
    return passed.item()


def write_plainly(path: Path, content: memoryview) -> None:
    """Write a file that was not there, and bring it and its entry in the folder to the disk."""
    with path.open("xb", buffering=0) as file:
        left = content
        while left:  # one call writes 2 GB at most
            left = left[file.write(left) :]
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_plainly(path: Path, weights: memoryview) -> None:
    """Read a file to where a load brings its bytes: weights to memory that is there, moments to memory that is new."""
    with path.open("rb", buffering=0) as file:
        left = weights
        while left:
            count = file.readinto(left)
            if not count:
                raise RuntimeError(f"checkpoints: {path.name} ended early, expected at least {len(weights)} bytes")
            left = left[count:]
        file.readall()


def make_cold(paths: Iterable[Path]) -> None:
    """Have the system drop what it keeps of these files in memory; they must be on the disk."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rates(megabytes: float, folder: Path, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of each action in every round, and the bytes that all ranks write or read in it."""
    model, optimizer, size = trained(megabytes)
    share = size // dist.get_world_size()
    content = memoryview(os.urandom(share))  # no disk makes less of it than of weights
    weights = memoryview(bytearray(share // 3))
    plain, saved = folder / f"plain-{dist.get_rank()}", folder / "step"
    writes = {"plain write": lambda: write_plainly(plain, content), "save": lambda: mics.save(saved, model, optimizer)}
    reads = {
        "plain read": lambda: read_plainly(plain, weights),
        "load": lambda: mics.load(saved, model, optimizer),
        "load without checksums": lambda: mics.load(saved, model, optimizer, verify=False),
    }
    warmths = [f"{name}, {how}" for name in reads for how in ("cold", "warm")]
    found: dict[str, list[float]] = {name: [] for name in (*writes, *warmths)}
    for turn in range(rounds):
        for name in order(list(writes), turn):
            found[name].append(timed(writes[name]))
        for name in order(list(reads), turn):
            make_cold([plain, *saved.iterdir()])
            found[f"{name}, cold"].append(timed(reads[name]))
            found[f"{name}, warm"].append(timed(reads[name]))
        dist.barrier()
        plain.unlink()  # the next round makes new files again
        if dist.get_rank() == 0:
            shutil.rmtree(saved)
    return found, size


def background(megabytes: float, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of ten steps, with a background save begun in the first one and without; its bytes; and how long it went
    on after the ten steps, which is in none of their times.
    """
    model, optimizer, size = trained(megabytes)
    x = torch.randn(ROWS, WIDTH)
    saved = folder / "behind"
    found: dict[str, list[float]] = {"without": [], "with": [], "beyond": []}
    saving: list[Any] = []

    def without() -> None:
        for _ in range(STEPS):
            step(model, optimizer, x)

    def with_save() -> None:
        step(model, optimizer, x)
        saving.append(mics.save(saved, model, optimizer, background=True))
        for _ in range(STEPS - 1):
            step(model, optimizer, x)

    ten = {"without": without, "with": with_save}
    for turn in range(rounds):
        for name in order(list(ten), turn):
            found[name].append(timed(ten[name]))
            if saving:
                found["beyond"].append(timed(saving.pop().wait))
                if dist.get_rank() == 0:
                    shutil.rmtree(saved)
    return {"seconds": found, "bytes": size}


def main(words: Sequence[str]) -> None:
    """Measure in a folder: so many MB in so many rounds; then steps, with so many MB, in so many rounds."""
    folder, megabytes, rounds, steps_megabytes, steps_rounds = words
    mics.init()
    torch.set_num_threads(1)
    seconds, size = rates(float(megabytes), Path(folder), int(rounds))
    beside = background(float(steps_megabytes), Path(folder), int(steps_rounds))
    if dist.get_rank() == 0:
        report({"seconds": seconds, "bytes": size, "background": beside})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
