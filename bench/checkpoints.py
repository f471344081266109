"""Checkpoints against the disk: GB/s of save and load beside a plain write and read, and what a background save costs.

    python -m bench.checkpoints [--megabytes 200]

One rank. Each round writes and reads as many bytes plainly, saves and loads, one after the other; a plain write ends
with the bytes on the disk, as a save does. Steps are timed with a background save under way and without.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import nn

import mics_core as mics
from bench import record

WIDTH = 1024
BYTES = 12  # a parameter: master and two moments


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def write_plainly(path: Path, content: memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def rates(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, rounds: int) -> dict[str, list[float]]:
    """GB/s of each, in every round."""
    size = BYTES * sum(parameter.numel() for parameter in model.parameters())
    content = memoryview(bytearray(os.urandom(1 << 20)) * (size >> 20))
    plain, saved = folder / "plain", folder / "step"
    actions: dict[str, Callable[[], object]] = {
        "plain write": lambda: write_plainly(plain, content),
        "save": lambda: mics.save(saved, model, optimizer),
        "plain read": plain.read_bytes,
        "load": lambda: mics.load(saved, model, optimizer),
    }
    found: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            seconds = timed(action)
            if turn:  # the first round allocates
                found[name].append(size / seconds / 1e9)
        plain.unlink()
        shutil.rmtree(saved)
    return found


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of ten steps, with a background save begun in the first of them and without."""
    x = torch.randn(256, WIDTH)
    found: dict[str, list[float]] = {"without": [], "with a save": []}

    def ten(save: bool) -> None:
        for number in range(10):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if save and number == 0:
                mics.save(folder / "behind", model, optimizer, background=True)

    for turn in range(rounds + 1):
        for name in found:
            seconds = timed(lambda save=name != "without": ten(save))  # type: ignore[misc]
            if turn:
                found[name].append(seconds)
            mics.save(folder / "waits", model, optimizer)  # for the one behind
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoints", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=200.0, help="of weights and optimizer state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "cpu" / "checkpoints.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    layers = max(1, round(options.megabytes * 1e6 / BYTES / WIDTH**2))
    model = mics.shard(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers))), mics.Sharding.ddp())
    optimizer = mics.AdamW(model.parameters())
    with tempfile.TemporaryDirectory(prefix="mics-checkpoints-") as name:
        behind = steps(model, optimizer, Path(name), options.rounds)
        found = rates(model, optimizer, Path(name), options.rounds)
    middle = {action: median(speeds) for action, speeds in found.items()}
    print(record.table(["", "GB/s"], [[action, f"{speed:.2f}"] for action, speed in middle.items()]))
    shares = {"save": middle["save"] / middle["plain write"], "load": middle["load"] / middle["plain read"]}
    cost = median(behind["with a save"]) / median(behind["without"]) - 1
    print(f"\nsave runs at {shares['save']:.2f} of a plain write, load at {shares['load']:.2f} of a plain read")
    print(f"ten steps with a background save take {cost:+.1%} of the time of ten steps without")
    words = ["python", "-m", "bench.checkpoints", *(sys.argv[1:] if arguments is None else arguments)]
    content = record.stamp(words, "cpu") | {"gb_per_s": found, "shares": shares, "ten_steps": behind, "cost": cost}
    print(f"saved {record.save(options.out, content)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
