"""Work at files that succeeds on all ranks or raises on all of them, with the same sentence."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from mics_core.checkpoint.at_disk import Task
from mics_core.comm.agreed import Outcome, Problem, results
from mics_core.comm.world import World
from mics_core.errors import NoCheckpoint

T = TypeVar("T")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ROOM = "cannot be written: {}, expected a disk with room: make room, or choose another path"
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)
_WRITABLE = "cannot be written: {}, expected a folder in which all ranks may make files: choose another path"
_ABLE = "cannot be written: {}, expected no error of the system: mend its cause, and save again"
_READABLE = "cannot be read: {}, expected files that all ranks may read: give another path"
_LOOKS = 3  # at a job in the time of the timeout: as many in a row that see no progress are its end


@dataclass(frozen=True)
class _Busy:
    doing: str
    looks: int  # in a row that saw it where it was


def on_all_ranks(world: World, caller: str, job: Callable[[], T], at_disk: str = "") -> list[T]:
    """Do a job on every rank; each rank's result, which should be small, or the first exception of any rank.

    A job at a disk, `at_disk` says which, is done in a thread, while this one tells the other ranks now and then how it
    gets on: it may take hours, but one that gets nowhere for about the timeout of `init` is an error on all ranks.
    """
    task = Task(job) if at_disk else None
    while True:
        mine: Outcome[T] = Outcome(None)
        cause: Exception | None = None
        busy = None
        if task is not None and not task.wait(world.timeout / _LOOKS):
            busy = _Busy(at_disk, task.looks())
        else:
            try:
                mine = Outcome(job() if task is None else task.result())
            except Exception as error:  # the other ranks must hear of it, whatever it is
                cause, mine = error, Outcome(None, _problem(caller, error))
        answers: list[Outcome[T] | _Busy] = world.all_gather_object(busy or mine, caller)
        over = [answer for answer in answers if not isinstance(answer, _Busy)]
        if len(over) == world.size:
            return results(world, _seen_by_all(over), mine, cause)
        for rank, answer in zip(world.ranks, answers, strict=True):
            if isinstance(answer, _Busy) and answer.looks >= _LOOKS:
                raise RuntimeError(
                    f"{caller}: rank {rank} got no further in {world.timeout:.0f} s with {answer.doing}, expected its "
                    "disk to answer within the timeout of mics.init, however slowly it works: see what that disk waits "
                    "for, or give init a longer timeout"
                )


def together(world: World, caller: str, job: Callable[[], T], at_disk: str = "") -> T:
    """Do a job on every rank; this rank's result."""
    found: list[T] = []
    on_all_ranks(world, caller, lambda: found.append(job()), at_disk)
    return found[0]


def _seen_by_all(outcomes: Sequence[Outcome[T]]) -> Sequence[Outcome[T]]:
    """Whoever begins anew for want of any checkpoint would save over what some ranks see: for them it is an error."""
    missing = [outcome.problem is not None and outcome.problem.kind is NoCheckpoint for outcome in outcomes]
    if all(missing):
        return outcomes
    return [
        replace(outcome, problem=Problem(RuntimeError, outcome.problem.text))
        if outcome.problem is not None and absent
        else outcome
        for outcome, absent in zip(outcomes, missing, strict=True)
    ]


def _problem(caller: str, error: Exception) -> Problem:
    if isinstance(error, NoCheckpoint):
        return Problem(NoCheckpoint, str(error))
    if not isinstance(error, OSError):
        return Problem.of(caller, error)
    said = _READABLE
    if caller == "save":
        said = _ROOM if error.errno in _FULL else _WRITABLE if error.errno in _DENIED else _ABLE
        said += "; older checkpoints are as they were"
    where = error.filename or "a file of the checkpoint"
    return Problem(RuntimeError, f"{caller}: {where} {said.format(error.strerror or error)}")
