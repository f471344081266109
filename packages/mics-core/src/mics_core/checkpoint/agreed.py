"""Work that succeeds on all ranks or raises on all of them, with the same sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from mics_core.comm import World
from mics_core.errors import ConfigError, LifecycleError

T = TypeVar("T")

_WRITABLE = (
    "expected a disk with room that all ranks may write to: choose another path or make room; older checkpoints are as "
    "they were"
)
_READABLE = "expected files that all ranks may read: give another path"


@dataclass(frozen=True)
class _Problem:
    kind: type[Exception]
    text: str


def exchange(world: World, caller: str, job: Callable[[], T]) -> list[T]:
    """Do a job on every rank; each rank's result, which should be small, or the first exception of any rank."""
    mine: tuple[T | None, _Problem | None] = (None, None)
    cause: Exception | None = None  # of what has no sentence of its own
    try:
        mine = (job(), None)
    except Exception as error:  # the other ranks must hear of it, whatever it is
        cause = None if isinstance(error, (ConfigError, LifecycleError, OSError)) else error
        mine = (None, _problem(caller, error))
    answers: list[tuple[T, _Problem | None]] = world.tell(mine, caller)
    for rank, (_, problem) in enumerate(answers):
        if problem is not None:
            here = mine[1] is not None and mine[1].text == problem.text
            raise problem.kind(problem.text if here else f"on rank {rank}: {problem.text}") from cause
    return [result for result, _ in answers]


def together(world: World, caller: str, job: Callable[[], T]) -> T:
    """Do a job on every rank; this rank's result."""
    results: list[T] = []
    exchange(world, caller, lambda: results.append(job()))
    return results[0]


def _problem(caller: str, error: Exception) -> _Problem:
    for kind in (ConfigError, LifecycleError):
        if isinstance(error, kind):
            return _Problem(kind, str(error))
    text = str(error).replace("\n", " ")
    if isinstance(error, OSError):
        where = error.filename or "a file of the checkpoint"
        return _Problem(
            RuntimeError, f"{caller}: {where}: {error.strerror}, {_WRITABLE if caller == 'save' else _READABLE}"
        )
    if type(error) is not RuntimeError:
        text = f"{caller}: {type(error).__name__}: {text}"
    return _Problem(RuntimeError, text)
