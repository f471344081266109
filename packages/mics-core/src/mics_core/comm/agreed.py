"""Work that succeeds on all ranks or raises on all of them, with the same sentence."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from mics_core.comm.at_disk import Task
from mics_core.comm.world import World
from mics_core.errors import ConfigError, LifecycleError, NoCheckpoint

T = TypeVar("T")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ROOM = "cannot be written: {}, expected a disk with room: make room, or choose another path"
_WRITABLE = "cannot be written: {}, expected a folder in which all ranks may make files: choose another path"
_READABLE = "cannot be read: {}, expected files that all ranks may read: give another path"
_LOOKS = 3  # at a job in the time of the timeout: as many in a row that see no progress are its end


@dataclass(frozen=True)
class _Problem:
    kind: type[Exception]
    text: str


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
        mine: tuple[T | None, _Problem | None] | _Busy = (None, None)
        cause: Exception | None = None  # of what has no sentence of its own
        if task is not None and not task.wait(world.timeout / _LOOKS):
            mine = _Busy(at_disk, task.looks())
        else:
            try:
                mine = (job() if task is None else task.result(), None)
            except Exception as error:  # the other ranks must hear of it, whatever it is
                cause = None if isinstance(error, (ConfigError, LifecycleError, OSError)) else error
                mine = (None, _problem(caller, error))
        answers: list[tuple[T, _Problem | None] | _Busy] = world.all_gather_object(mine, caller)
        over = [answer for answer in answers if not isinstance(answer, _Busy)]
        if len(over) == world.size:
            break
        for rank, answer in zip(world.ranks, answers, strict=True):
            if isinstance(answer, _Busy) and answer.looks >= _LOOKS:
                raise RuntimeError(
                    f"{caller}: rank {rank} got no further in {world.timeout:.0f} s with {answer.doing}, expected its "
                    "disk to answer within the timeout of mics.init, however slowly it works: see what that disk waits "
                    "for, or give init a longer timeout"
                )
    for rank, (_, problem) in zip(world.ranks, over, strict=True):
        if problem is not None:
            here = mine == (None, problem) or problem.text.startswith("on rank ")  # as that of a save before
            kind = problem.kind
            if kind is NoCheckpoint and not all(other is not None and other.kind is kind for _, other in over):
                kind = RuntimeError  # whoever begins anew for want of any would save over what some ranks see
            raise kind(problem.text if here else f"on rank {rank}: {problem.text}") from cause
    return [result for result, _ in over]


def together(world: World, caller: str, job: Callable[[], T], at_disk: str = "") -> T:
    """Do a job on every rank; this rank's result."""
    results: list[T] = []
    on_all_ranks(world, caller, lambda: results.append(job()), at_disk)
    return results[0]


def _problem(caller: str, error: Exception) -> _Problem:
    for kind in (ConfigError, LifecycleError, NoCheckpoint):
        if isinstance(error, kind):
            return _Problem(kind, str(error))
    text = str(error).replace("\n", " ")
    if isinstance(error, OSError):
        where = error.filename or "a file of the checkpoint"
        said = _READABLE
        if caller == "save":
            said = (_ROOM if error.errno in _FULL else _WRITABLE) + "; older checkpoints are as they were"
        return _Problem(RuntimeError, f"{caller}: {where} {said.format(error.strerror or error)}")
    if type(error) is not RuntimeError:
        text = f"{caller}: {type(error).__name__}: {text}"
    return _Problem(RuntimeError, text)
