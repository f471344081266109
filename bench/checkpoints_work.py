"""What checkpoints.py runs on every rank: writes and reads of as many bytes, plainly and as checkpoints, in turns."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # here, once: mics.shard imports it on every rank
import torch.distributed as dist
from torch import nn

import mics_core as mics
from bench.harness import order
from bench.ranks import report

WIDTH = 1024
BYTES = 12  # a parameter: master and two moments
ROWS = 256  # of a step


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
    with path.open("wb", buffering=0) as file:
        file.write(content)
        os.fsync(file.fileno())


def read_plainly(path: Path, memory: memoryview) -> None:
    with path.open("rb", buffering=0) as file:
        if file.readinto(memory) != len(memory):
            raise RuntimeError(f"checkpoints: {path.name} was not read in one go, expected {len(memory)} bytes")


def make_cold(paths: Iterable[Path]) -> None:
    """Have the system drop what it keeps of these files in memory; they must be on the disk."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rates(megabytes: float, folder: Path, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of each action in every round, and the bytes that all ranks write or read in it."""
    model, optimizer, size = trained(megabytes)
    share = size // dist.get_world_size()
    content = memoryview(torch.randn(share // 4).numpy()).cast("B")  # no disk makes less of it than of weights
    memory = memoryview(bytearray(share))
    plain, saved = folder / f"plain-{dist.get_rank()}", folder / "step"

    def load(verify: bool) -> None:
        mics.load(saved, model, optimizer, verify=verify)

    writes = {"plain write": lambda: write_plainly(plain, content), "save": lambda: mics.save(saved, model, optimizer)}
    reads = {
        "plain read": lambda: read_plainly(plain, memory),
        "load": lambda: load(True),
        "load without checksums": lambda: load(False),
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
        plain.unlink()
        if dist.get_rank() == 0:
            shutil.rmtree(saved)
    return found, size


def background(megabytes: float, folder: Path, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of ten steps, with a background save begun in the first one and without; and the bytes of the save."""
    model, optimizer, size = trained(megabytes)
    x = torch.randn(ROWS, WIDTH)
    found: dict[str, list[float]] = {"without": [], "with": []}

    def ten(save: bool) -> None:
        for number in range(10):
            step(model, optimizer, x)
            if save and number == 0:
                saving.append(mics.save(folder / "behind", model, optimizer, background=True))

    for turn in range(rounds):
        for name in order(list(found), turn):
            saving: list[Any] = []
            found[name].append(timed(lambda save=name == "with": ten(save)))  # type: ignore[misc]
            for each in saving:
                each.wait()
    return found, size


def main(words: Sequence[str]) -> None:
    """Measure with so many MB, with so many MB while steps go on, in so many rounds, in a folder."""
    megabytes, steps_megabytes, rounds, parent = float(words[0]), float(words[1]), int(words[2]), words[3]
    mics.init()
    torch.set_num_threads(1)
    places = [tempfile.mkdtemp(prefix="mics-checkpoints-", dir=parent or None) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(places)
    folder = Path(places[0])
    try:
        seconds, size = rates(megabytes, folder, rounds)
        steps, steps_size = background(steps_megabytes, folder, rounds)
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
    if dist.get_rank() == 0:
        report({"seconds": seconds, "bytes": size, "steps": steps, "steps_bytes": steps_size})
    dist.destroy_process_group()
