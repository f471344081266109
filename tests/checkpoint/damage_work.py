"""What the tests of damaged checkpoints and wrong requests ask ranks to do."""

import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mics_core as mics
from checkpoint_work import Cluster, Model, Setting, build, held, train
from mics_core.checkpoint import saving

PAIR = Cluster(2, 2, mics.Sharding(1, 1, 2))


def saved(folder: Path) -> tuple[Model, torch.optim.Optimizer]:
    """A checkpoint at folder/step-1, and who wrote it."""
    model, optimizer = build(PAIR, Setting(), seed=1)
    train(model, optimizer, 0, 1)
    mics.save(folder / "step-1", model, optimizer, step=1)
    return model, optimizer


def on_first_rank() -> bool:
    return dist.get_rank() == 0


def damages(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """What may become of a file's content; None if the file is lost."""
    content = path.read_bytes()
    yield "missing", None
    yield "shorter", content[:-1]
    yield "empty", b""
    yield "longer", content + b"\n"
    for place in (0, len(content) // 3, len(content) // 2, len(content) - 1):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        yield f"bit {place}", bytes(flipped)


def load_damaged(folder: Path) -> list[tuple[str, str, str, list[str]]]:
    """For every file and damage: what loading says, and what of the memory it has changed."""
    saved(folder)
    model, optimizer = build(PAIR, Setting(), seed=3)
    train(model, optimizer, 9, 2)
    before = held(model, optimizer)
    found = []
    names = sorted(path.name for path in (folder / "step-1").iterdir())
    for name in names:
        path = folder / "step-1" / name
        content = path.read_bytes()
        for damage, changed in list(damages(path)):
            dist.barrier()
            if on_first_rank():
                path.unlink() if changed is None else path.write_bytes(changed)
            dist.barrier()
            said = "nothing"
            try:
                mics.load(folder, model, optimizer)
            except RuntimeError as error:
                said = str(error)
            dist.barrier()
            if on_first_rank():
                path.write_bytes(content)
            dist.barrier()
            found.append((name, damage, said, []))
    after = held(model, optimizer)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert mics.load(folder, model, optimizer) == {"step": 1}
    return [(name, damage, said, changed) for name, damage, said, _ in found]


class Wider(Model):
    def __init__(self) -> None:
        super().__init__(width=7)


class Longer(Model):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Parameter(torch.zeros(2))


class Shorter(Model):
    def __init__(self) -> None:
        super().__init__()
        del self.idle


def load_into_another(folder: Path, kind: str) -> None:
    """Load into what is not what was saved."""
    model, _ = saved(folder)
    if kind == "nowhere":
        mics.load(folder / "nowhere" / "step-7", model, None)
    if kind in ("Wider", "Longer", "Shorter"):
        model = mics.shard(globals()[kind](), mics.Sharding.mics(2))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer = mics.AdamW(parameters)
    if kind == "SGD":
        optimizer = torch.optim.SGD(parameters)
    elif kind == "fewer":
        optimizer = mics.AdamW(parameters[1:])
    elif kind == "one rank":
        dist.barrier()
        folder = folder if on_first_rank() else folder / "step-1" / "nothing"
    passed = None if kind == "one optimizer" and on_first_rank() else optimizer
    mics.load(folder, model, passed, verify=kind != "one verifies" or on_first_rank())


@contextmanager
def short_of_space() -> Iterator[None]:
    """Files cannot grow beyond a few bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def fail_to_save(folder: Path, how: str) -> tuple[str, list[str], bool]:
    """What a save says that cannot work; what is in the folder then; whether the one before can be loaded."""
    model, optimizer = saved(folder)
    path, keep, extra, passed = folder / "step-2", None, {}, optimizer
    if how == "not a directory":
        path = folder / "latest" / "step-2"
    elif how == "below a file":
        path = folder / "latest" / "runs" / "step-2"
    elif how == "no place":
        path = Path("/proc/step-2")
    elif how == "keep":
        keep = 0
    elif how == "paths":
        path = folder / f"step-{2 + dist.get_rank()}"
    elif how == "full behind":  # the first save of this kind makes a process group, which needs a file, too
        mics.save(folder / "step-1", model, optimizer, step=1, background=True).wait()
    elif how == "extra":
        extra = {"function": lambda: None}
    elif how == "optimizer":
        passed = optimizer if dist.get_rank() == 1 else None
    elif how == "gradients":
        model(torch.ones(2, 6)).sum().backward()
    said = "nothing"
    try:
        if how in ("full", "full behind"):
            dist.barrier()
            if dist.get_rank() == 1:
                with short_of_space():
                    mics.save(path, model, optimizer, background=how == "full behind").wait()
            else:
                mics.save(path, model, optimizer, background=how == "full behind").wait()
        elif how == "no memory" and dist.get_rank() == 1:
            with patch.object(saving, "random_state", side_effect=MemoryError("for the random numbers of rank 1")):
                mics.save(path, model, passed)
        else:
            mics.save(path, model, passed, keep=keep, **extra)
    except (RuntimeError, ValueError) as error:
        said = str(error)
    dist.barrier()
    there = sorted(path.name for path in folder.iterdir() if path.name != ".lock")
    return said, there, mics.load(folder, model, optimizer) == {"step": 1}


def save_inside(folder: Path) -> None:
    model, optimizer = saved(folder)

    def hook(*_: object) -> None:
        mics.save(folder / "step-2", model, optimizer)

    model.blocks[1].register_forward_hook(hook)
    model(torch.ones(2, 6))


def fail_behind(folder: Path, odd: int) -> list[str]:
    """A save in the background fails on a rank: rank 0 cannot publish it, others cannot write; then comes another."""
    model, optimizer = saved(folder)
    dist.barrier()
    path = folder / "step-2"
    saving = mics.save(path, model, optimizer, background=True)
    saving.wait()
    if on_first_rank():
        shutil.rmtree(path)
        path.write_text("in the way")  # rank 0 cannot rename to it
    dist.barrier()
    said = []
    blocked = folder / "step-3"
    called = "open" if odd else "rename"
    real = getattr(Path, called)

    def refuse(self: Path, *arguments: Any, **named: Any) -> Any:
        if ".step-3.saving" in self.parts and dist.get_rank() == odd:
            raise OSError(28, "No space left on device")
        return real(self, *arguments, **named)

    setattr(Path, called, refuse)
    try:
        mics.save(blocked, model, optimizer, background=True)
        for _ in range(2):
            try:
                mics.save(folder / "step-4", model, optimizer)
                said.append("saved")
            except RuntimeError as error:
                said.append(str(error))
    finally:
        setattr(Path, called, real)
    return said


def keep_two(folder: Path) -> list[list[str]]:
    """What is there after each of five saves, the last of which replaces one; and what a killed save left is gone."""
    model, optimizer = saved(folder)
    there = []
    for step in (2, 3, 4, 3):
        if on_first_rank():
            (folder / ".step-9.saving").mkdir()
            (folder / "notes").mkdir(exist_ok=True)
        dist.barrier()
        mics.save(folder / f"step-{step}", model, optimizer, step=step, keep=2)
        there.append(sorted(path.name for path in folder.iterdir() if path.name != ".lock"))
        assert mics.load(folder, model, optimizer) == {"step": step}
        dist.barrier()
    return there


def fail_to_remove(folder: Path) -> tuple[list[str], list[str], dict[str, int]]:
    """What is warned of when an old checkpoint cannot be removed; what is there after the next save."""
    model, optimizer = saved(folder)
    real = shutil.rmtree

    def refuse(path: Path) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shutil.rmtree = refuse  # type: ignore[assignment]
        try:
            mics.save(folder / "step-2", model, optimizer, step=2, keep=1)
        finally:
            shutil.rmtree = real
    extra = mics.load(folder, model, optimizer)
    mics.save(folder / "step-3", model, optimizer, step=3, keep=2)
    dist.barrier()
    there = sorted(path.name for path in folder.iterdir())
    return [str(warning.message) for warning in caught], there, extra


def save_slices(folder: Path) -> tuple[str, list[str], dict[str, object]]:
    """What is said of slices as extra, and what is there then; what comes back of what is rank 0's or alike."""
    model, optimizer = build(PAIR, Setting(), seed=1)
    said, rank = "nothing", dist.get_rank()
    try:
        mics.save(folder / "step-1", model, optimizer, step=1, ema=[p.detach().clone() for p in model.parameters()])
    except ValueError as error:
        said = str(error)
    dist.barrier()
    there = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    extra = {"elapsed": None if rank else 1.5, "absent": None, "every": [0, 1]}
    mics.save(folder / "step-1", model, optimizer, **extra)
    return said, there, mics.load(folder, model, optimizer)


def save_beside_another(folder: Path) -> list[str]:
    """What a save says while another process saves in its folder, and afterwards."""
    model, optimizer = saved(folder)
    said = []
    other: subprocess.Popen[bytes] | None = None
    if on_first_rank():
        code = f"import fcntl; f = open({str(folder / '.lock')!r}); fcntl.flock(f, 2); print(); input()"
        other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert other.stdout is not None
        other.stdout.readline()
        (folder / ".step-2.saving").mkdir()
    dist.barrier()
    for _ in range(2):
        try:
            mics.save(folder / "step-2", model, optimizer)
            said.append("saved")
        except ValueError as error:
            said.append(str(error))
            assert (folder / ".step-2.saving").is_dir()  # which the other one writes to
        if other is not None and other.poll() is None:
            other.kill()  # as a training that dies while saving
            other.communicate()
        dist.barrier()
    return said


def save_tied(folder: Path, cluster: Cluster) -> dict[str, Tensor]:
    """The weights and a moment, whole."""
    model, optimizer = build(cluster, Setting(), seed=1)
    train(model, optimizer, 0, 2)
    mics.save(folder / "step-2", model, optimizer, scheduler={"last_epoch": 2})
    return held(model, optimizer)


def sizes(folder: Path, cluster: Cluster) -> None:
    """A model that is large enough for its weights to outweigh their description."""
    model = mics.shard(nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 200)), cluster.sharding)
    optimizer = mics.AdamW(model.parameters())
    model(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    mics.save(folder / "step-1", model, optimizer)
