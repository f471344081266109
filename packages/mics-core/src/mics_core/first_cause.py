"""Why the first rank ended, told to the others: their own errors follow from it, and say so.

A rank that ends with an error writes a sentence into the store at which ranks met, unless one is there. Whoever then
fails because a message does not come reads it.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

_GRACE = 1.0  # seconds: a rank that is ending may not have told yet
_ROLL_CALL = 5.0  # seconds: a rank on a busy machine is not to be taken for one that does not come
_PAUSE = 0.05
_LONGEST = 500  # characters of another rank's sentence

_store: Any = None  # torch does not name the type
_rank = 0


def remember_store() -> None:
    """Keep the store of the default process group, which may be gone when it is needed."""
    global _store, _rank
    _store, _rank = dist.distributed_c10d._get_default_store(), dist.get_rank()


def publish(error: BaseException) -> None:
    """Tell all ranks that this one ends by an error; if another one has told already, that stays."""
    if _store is None:
        return
    text = " ".join(f"rank {_rank} raised {type(error).__name__}: {error}".split())[:_LONGEST]
    try:
        _store.compare_set(_key(), "", text)
    except RuntimeError:
        return  # who keeps the store is gone, and so are those who would read it


def known() -> str:
    """What the first rank told that ended; "" if none has."""
    if _store is None:
        return ""
    deadline = time.monotonic() + _GRACE
    try:
        while not _store.check([_key()]):
            if time.monotonic() > deadline:
                return ""
            time.sleep(_PAUSE)
        return str(_store.get(_key()).decode(errors="replace"))
    except RuntimeError:
        return ""  # the store is gone with the rank that kept it


def absentees(meeting: str, ranks: Sequence[int]) -> list[int]:
    """Those of these ranks that do not say, a moment after this one, that the same meeting has failed for them, too.

    Whoever waits for messages hears of a failure at once, as connections are closed; whoever does not come, does not.
    """
    if _store is None:
        return []
    keys = {rank: f"mics: rank {rank} misses others in {meeting}, {_start()}" for rank in ranks}
    deadline = time.monotonic() + _ROLL_CALL
    try:
        _store.set(keys[_rank], "")
        while not _store.check(list(keys.values())) and not _store.check([_key()]):  # which names who ended
            if time.monotonic() > deadline:
                return [rank for rank, key in keys.items() if not _store.check([key])]
            time.sleep(_PAUSE)
    except RuntimeError:  # the store is gone with the rank that kept it
        return []
    return []


def blamed(what: str, error: BaseException) -> RuntimeError:
    """The error of something that needs other ranks: the first cause first, what the network said last."""
    cause = known()
    after = f" after {cause}" if cause else ""
    return RuntimeError(f"{what} failed on rank {_rank}{after}: {error}")


def _key() -> str:
    return f"mics: why the first rank ended, {_start()}"


def _start() -> str:
    return f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def publish_at_the_end() -> None:
    """Tell what ends the interpreter, if that is an error; called once, when all else that waits at exit is registered.

    What is registered last comes first: the others wait for a second, and lanes and saves may take longer to end.
    """
    atexit.register(_publish_what_ends_us)


def _publish_what_ends_us() -> None:
    error = getattr(sys, "last_value", None)  # what ends the interpreter
    if error is not None:
        publish(error)
