"""A program: two ranks train and save, and are killed again and again by SIGKILL; prints what became of them as JSON.

    mortal.py FOLDER steps EVERY       rank 0 dies at the first thing that its second save asks of the disk, then at the
                                       next one in its next life, or EVERY later, until a life survives all of them
    mortal.py FOLDER at-once KILLS     both die so many times at any moment
    mortal.py FOLDER behind KILLS      likewise, with saves in the background

The processes are forks of this one, which has imported everything, so that many lives fit into a test.
"""

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import mics_core as mics

RANKS, EVERY = 2, 2
STEPS = {"steps": 60, "at-once": 160, "behind": 160}  # enough for so many lives
SURVIVED = 7  # the exit status of a life that nothing has killed


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.1), nn.Tanh()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def note(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(f"{line}\n")


def warm_up(folder: Path) -> None:
    """Everything once, in a world of one, so that forks need not import what torch imports late."""
    model = mics.shard(Tiny(), mics.Sharding.ddp())
    optimizer = mics.AdamW(model.parameters())
    model(torch.ones(1, 16)).sum().backward()
    optimizer.step()
    mics.save(folder / "warm" / "step-1", model, optimizer)
    mics.load(folder / "warm", model, optimizer)


def die_at(number: int) -> None:
    """From here on the `number`th thing that is asked of the disk kills this process instead of being done."""
    left = number

    def mortal(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "fdatasync", "rename", "replace", "mkdir", "rmdir", "unlink"):
        setattr(os, name, mortal(getattr(os, name)))


def live(rank: int, life: int, folder: Path, how: str, steps: int, every: int) -> None:
    """Train from the latest checkpoint on, as far as one gets."""
    behind = how == "behind"
    torch.manual_seed(rank)
    store = dist.FileStore(str(folder / f"store-{life}"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    model = mics.shard(Tiny(), mics.Sharding(1, 1, 2), ranks_per_node=1)
    optimizer = mics.AdamW(model.parameters(), lr=1e-2)
    runs = folder / "runs"
    try:
        first = mics.load(runs, model, optimizer)["step"]
    except mics.NoCheckpoint:
        first = 0
    note(folder / f"begun-{rank}", str(first))
    for step in range(first, steps):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(100 * step + rank))
        loss = (model(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        note(folder / f"losses-{rank}", f"{step} {loss.item().hex()}")
        if (step + 1) % EVERY == 0:
            if how == "steps" and rank == 0 and step == first + 2 * EVERY - 1:
                die_at(every * life + 1)
            saving = mics.save(runs / f"step-{step + 1}", model, optimizer, step=step + 1, keep=2, background=behind)
            # A save in the background is complete when the next one has begun.
            if step + 1 - EVERY * behind:
                note(folder / f"saved-{rank}", str(step + 1 - EVERY * behind))
            if how == "steps" and step == first + 2 * EVERY - 1:
                os._exit(SURVIVED)  # a save asks no more of the disk than all lives before have met
    if how == "steps":
        raise RuntimeError(f"{steps} steps are over before a life has survived its second save: give more")
    if behind:
        saving.wait()
    dist.destroy_process_group()


def fork(rank: int, life: int, folder: Path, how: str, steps: int, every: int = 1) -> int:
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE="1", GLOO_SOCKET_IFNAME="lo")
            live(rank, life, folder, how, steps, every)
            status = 0
        finally:
            os._exit(status)
    return process


def under_way(runs: Path) -> set[tuple[str, int]]:
    """Each directory of a save that is not complete, and when it was made: the dead leave some, too."""
    found = set()
    for path in runs.glob(".*.*"):
        with suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ctime_ns))
    return found


def kill_after(processes: list[int], seconds: float, folder: Path, in_a_save: bool) -> None:
    """Kill them so long after a save of theirs began, or was complete."""
    before, last = under_way(folder / "runs"), latest(folder)
    deadline = time.monotonic() + 600  # only ends a hang
    while not under_way(folder / "runs") - before if in_a_save else latest(folder) == last:
        if os.waitpid(processes[0], os.WNOHANG) != (0, 0) or time.monotonic() > deadline:
            raise RuntimeError("a rank ended by itself, or did not begin")
        time.sleep(0.0005)
    time.sleep(seconds)
    for process in random.sample(processes, len(processes)):
        os.kill(process, signal.SIGKILL)
        time.sleep(random.random() * 0.002)
    for process in processes:
        os.waitpid(process, 0)


def latest(folder: Path) -> int:
    """When a save was last complete."""
    path = folder / "runs" / "latest"
    return path.stat().st_mtime_ns if path.exists() else 0


def begun(folder: Path) -> list[int]:
    """The step that each life began with."""
    path = folder / "begun-0"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def losses(folder: Path) -> list[dict[str, list[str]]]:
    """For each rank what was seen for each step, in all lives."""
    found = []
    for rank in range(RANKS):
        seen: dict[str, list[str]] = {}
        for line in (folder / f"losses-{rank}").read_text().splitlines():
            if len(words := line.split()) == 2:  # the last line of a life may be cut
                seen.setdefault(words[0], []).append(words[1])
        found.append(seen)
    return found


def is_lost(folder: Path) -> bool:
    """Whether a checkpoint that was said to be complete is not what a load would find."""
    saved, runs = folder / "saved-0", folder / "runs"
    last = max((int(line) for line in saved.read_text().split()), default=0) if saved.exists() else 0
    try:
        there = mics.checkpoint.finding.find(runs).name
    except mics.NoCheckpoint:
        there = "step-0"
    return int(there.removeprefix(".").removesuffix(".replaced").removeprefix("step-")) < last


def die_by_steps(folder: Path, every: int) -> tuple[int, int]:
    """Lives that end at one thing after the other; how many there were, and how many lost a checkpoint."""
    lost = 0
    for life in itertools.count():
        first, second = (fork(rank, life, folder, "steps", STEPS["steps"], every) for rank in range(RANKS))
        status = os.waitpid(first, 0)[1]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == SURVIVED:
            os.waitpid(second, 0)
            return life, lost
        if status != signal.SIGKILL:
            raise RuntimeError(f"life {life} ended with status {status}, expected to be killed")
        os.kill(second, signal.SIGKILL)
        os.waitpid(second, 0)
        lost += is_lost(folder)
    raise AssertionError


def die_by_chance(folder: Path, kills: int, how: str) -> tuple[int, int]:
    """Lives that end at any moment; how many there were, and how many lost a checkpoint."""
    lost = 0
    for life in range(kills):
        processes = [fork(rank, life, folder, how, STEPS[how]) for rank in range(RANKS)]
        in_a_save = life % 2 == 0
        kill_after(processes, random.random() * (0.02 if in_a_save else 0.05), folder, in_a_save)
        lost += is_lost(folder)
    return kills, lost


def main(folder: Path, how: str, kills: int = 0) -> None:
    torch.set_num_threads(1)
    random.seed(kills)
    warm_up(folder)
    (folder / "calm").mkdir()
    undisturbed = "behind" if how == "behind" else "at-once"
    calm = [fork(rank, 0, folder / "calm", undisturbed, STEPS[how]) for rank in range(RANKS)]
    fates = [os.waitpid(process, 0)[1] for process in calm]
    lives, lost = die_by_steps(folder, kills) if how == "steps" else die_by_chance(folder, kills, how)
    processes = [fork(rank, lives + 1, folder, undisturbed, STEPS[how]) for rank in range(RANKS)]
    fates += [os.waitpid(process, 0)[1] for process in processes]
    told = {
        "fates": fates,
        "lives": lives,
        "lost": lost,
        "calm": losses(folder / "calm"),
        "found": losses(folder),
        "begun": begun(folder),
        "steps": STEPS[how],
        "there": sorted(path.name for path in (folder / "runs").iterdir() if path.name != ".lock"),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
