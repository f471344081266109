"""What the tests of loads beside saves ask two ranks to do."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import mics_core as mics
from mics_core.checkpoint import loading
from mics_core.checkpoint.reading import Stored


def filled(value: float) -> nn.Module:
    """A model whose weights are this value."""
    model = mics.shard(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), mics.Sharding(1, 1, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def values(model: nn.Module) -> set[float]:
    """All that its weights are."""
    with mics.full_params(model):
        return {value for parameter in model.parameters() for value in parameter.flatten().tolist()}


@contextmanager
def after(kind: type, name: str, job: Callable[[], None], *, first: bool = False) -> Iterator[None]:
    """Let a job follow, or precede, a method."""
    real = getattr(kind, name)

    def both(*arguments: Any) -> Any:
        if first:
            job()
        result = real(*arguments)
        if not first:
            job()
        return result

    setattr(kind, name, both)
    try:
        yield
    finally:
        setattr(kind, name, real)


def load_beside(folder: Path, moment: str) -> tuple[str, set[float]]:
    """Load step-1 while another one takes its name; what is said, and what the weights are then."""
    mics.save(folder / "step-1", filled(1.0), None, value=1.0)
    mics.save(folder / "other", filled(2.0), None, value=2.0)
    model = filled(-1.0)

    def replace() -> None:
        if dist.get_rank() == 0:
            (folder / "step-1").rename(folder / ".step-1.replaced")
            (folder / "other").rename(folder / "step-1")
            if moment == "read":
                shutil.rmtree(folder / ".step-1.replaced")
        dist.barrier()

    def replace_for_rank_1() -> None:
        if dist.get_rank() == 0:
            replace()
        else:
            dist.barrier()

    hooks = {
        "found": after(Stored, "__init__", replace_for_rank_1, first=dist.get_rank() == 1),
        "verified": after(Stored, "verify", replace),
        "read": after(loading._Job, "read", replace, first=True),
    }
    with hooks[moment]:
        try:
            said = str(mics.load(folder / "step-1", model, None)["value"])
        except (RuntimeError, ValueError) as error:
            said = str(error)
    return said, values(model)
