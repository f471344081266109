"""Work that succeeds on all ranks or raises on all of them, with the same sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from mics_core.comm.world import World
from mics_core.errors import ConfigError, LifecycleError

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """An exception as the other ranks hear of it."""

    kind: type[Exception]
    text: str

    @classmethod
    def of(cls, caller: str, error: Exception) -> Problem:
        """What has a sentence of its own keeps it."""
        for kind in (ConfigError, LifecycleError):
            if isinstance(error, kind):
                return cls(kind, str(error))
        text = str(error).replace("\n", " ")
        return cls(RuntimeError, text if type(error) is RuntimeError else f"{caller}: {type(error).__name__}: {text}")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What became of a rank's job."""

    result: T | None
    problem: Problem | None = None


def on_all_ranks(world: World, caller: str, job: Callable[[], T]) -> list[T]:
    """Do a job on every rank; each rank's result, which should be small, or the first exception of any rank."""
    cause: Exception | None = None
    try:
        mine = Outcome(job())
    except Exception as error:  # the other ranks must hear of it, whatever it is
        cause, mine = error, Outcome(None, Problem.of(caller, error))
    return results(world, world.all_gather_object(mine, caller), mine, cause)


def results(world: World, outcomes: Sequence[Outcome[T]], mine: Outcome[T], cause: Exception | None) -> list[T]:
    """What all ranks' jobs returned; raises the first problem, of which `cause` is this rank's own."""
    for rank, outcome in zip(world.ranks, outcomes, strict=True):
        problem = outcome.problem
        if problem is not None:
            here = problem == mine.problem or problem.text.startswith("on rank ")  # as that of a save before
            said = isinstance(cause, (ConfigError, LifecycleError, OSError))  # the sentence says it all
            raise problem.kind(problem.text if here else f"on rank {rank}: {problem.text}") from None if said else cause
    return [outcome.result for outcome in outcomes]  # type: ignore[misc]
