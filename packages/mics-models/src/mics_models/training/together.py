"""Work that may fail on some ranks: all of them hear of it, so that none waits for one that is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from mics_models.sentences import sentence

Result = TypeVar("Result")


class Refused(Exception):
    """Something that cannot be done as asked; every rank raises the same sentence."""


class Unheard(RuntimeError):
    """Other ranks do not answer: one of them is gone, or its link is down."""


@contextmanager
def hearing() -> Iterator[None]:
    """Unheard if this is a failure of what waits for other ranks."""
    try:
        yield
    except RuntimeError as error:
        raise Unheard(f"hearing all ranks failed: {error}") from error


def everyone(mine: object) -> list[Any]:
    """What each rank says here, in the order of ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    said: list[Any] = [None] * dist.get_world_size()
    with hearing():
        dist.all_gather_object(said, mine)
    return said


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
