"""How ranks meet: in a part of the launcher's store that is new in each start, all of them or none.

torchrun starts ranks again at the same store, where what those before wrote still stands, such as where they listened.
Its count of restarts tells nothing: each node has its own. So a rank asks under a name that nobody had before it, and
rank 0, which cannot know whether a question is an old one, answers until all ranks that are there have thanked it.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

from torch.distributed.distributed_c10d import PrefixStore, Store

from mics_core.comm import placement
from mics_core.errors import ConfigError, LostRank

_PAUSE = 0.02
_FAREWELL = timedelta(seconds=10)


@dataclass(frozen=True)
class Start:
    """What ranks have agreed on."""

    store: Store  # the part that is this start's
    shared: bool  # whether they share GPUs


def meet(store: Store, rank: int, world: int, trouble: str, timeout: timedelta, place: str = "") -> Start:
    """Meet the other ranks. If a rank has trouble, all raise what the first of them says."""
    mine = uuid4().hex
    store.set_timeout(timeout)
    if rank == 0:
        start = _start(store, mine)
        said = [(trouble, place), *_hear_all(store, start, mine, world, timeout)]
        verdict = next(filter(None, (each for each, _ in said)), "")
        shared = False
        try:
            shared = not verdict and placement.shared([at for _, at in said], range(world))
        except ConfigError as error:
            verdict = str(error)
        start.set("shared", "yes" if shared else "")
        start.set("verdict", verdict)
        if verdict and world > 1:  # this rank raises, and may keep the store
            with suppress(RuntimeError):
                start.wait([_heard(other) for other in range(1, world)], _FAREWELL)
    else:
        store.set(_question(rank), mine)
        try:
            start = _start(store, store.get(_answer(mine)).decode())
            start.set(_place(rank), place)
            start.set(_thanks(rank), trouble)
            start.wait(["verdict"])
            verdict, shared = start.get("verdict").decode(), bool(start.get("shared"))
            start.set(_heard(rank), "")
        except RuntimeError as error:  # nobody answered for too long, or who keeps the store is gone
            raise LostRank(
                f"init: rank {rank} did not hear that all {world} ranks are there: look for the error of one that is "
                f"not, or give init a longer timeout than {timeout} ({error})"
            ) from error
    if verdict:
        raise ConfigError(verdict)
    return Start(start, shared)


def _hear_all(store: Store, start: Store, mine: str, world: int, timeout: timedelta) -> list[tuple[str, str]]:
    """Answer the other ranks until each has said its trouble and its place."""
    answered: dict[int, bytes] = {}
    end = time.monotonic() + timeout.total_seconds()
    while missing := [rank for rank in range(1, world) if not start.check([_thanks(rank)])]:
        if time.monotonic() > end:
            raise LostRank(
                f"init: after {timeout} ranks {missing} of {world} have not come: look for an error of theirs, or give "
                "init a longer timeout"
            )
        for rank in missing:
            if store.check([_question(rank)]) and (name := store.get(_question(rank))) != answered.get(rank):
                store.set(_answer(name.decode()), mine)
                answered[rank] = name
        time.sleep(_PAUSE)
    return [(start.get(_thanks(rank)).decode(), start.get(_place(rank)).decode()) for rank in range(1, world)]


def _start(store: Store, name: str) -> Store:
    return PrefixStore(f"mics start {name}", store)


def _question(rank: int) -> str:
    return f"mics: rank {rank} asks for the start"


def _answer(name: str) -> str:
    return f"mics: the start of {name}"


def _heard(rank: int) -> str:
    return f"rank {rank} has heard"


def _place(rank: int) -> str:
    return f"the place of rank {rank}"


def _thanks(rank: int) -> str:
    return f"the trouble of rank {rank}"
