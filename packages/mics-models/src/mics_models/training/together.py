"""Work that may fail on some ranks: all of them hear of it, so that none waits for one that is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from mics_core.comm.world import hear_all
from mics_core.errors import LostRank
from mics_models.sentences import sentence

Result = TypeVar("Result")


class Refused(Exception):
    """Something that cannot be done as asked; every rank raises the same sentence."""


@contextmanager
def refusing(before: str = "") -> Iterator[None]:
    """Refused if the runtime raises, which it does alike on all ranks, unless one is lost or a device fails."""
    try:
        yield
    except (LostRank, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, ValueError) as error:
        raise Refused(f"{before}{error}") from error


def everyone(mine: object) -> list[Any]:
    """What each rank says here, in the order of ranks."""
    return hear_all(mine, "between steps")


def together(work: Callable[[], Result]) -> Result:
    """Do the work on every rank; Refused on all of them if a user's mistake or a disk stops it on one."""
    result, problem = None, None
    try:
        result = work()
    except (ValueError, OSError, ImportError) as error:
        problem = sentence(error)
    problems = everyone(problem)
    for rank, said in enumerate(problems):
        if said is not None:
            raise Refused(said if said == problems[0] else f"on rank {rank}: {said}")
    return result  # type: ignore[return-value]


def agree(what: Mapping[str, object]) -> None:
    """Refuse to go on if ranks were told, or found, different things."""
    said = everyone(dict(what))
    for rank, theirs in enumerate(said):
        for name, value in theirs.items():
            if value != said[0].get(name):
                raise Refused(
                    f"{name} is {value!r} on rank {rank} and {said[0].get(name)!r} on rank 0, expected the same "
                    "everywhere: tell all ranks alike"
                )
