"""Why the first rank ended, told to the others: their own errors follow from it, and say so.

A rank that ends with an error writes a sentence into the store at which ranks met, unless one is there. Whoever then
fails because a message does not come reads it.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

_GRACE = 1.0  # seconds: a rank that is ending may not have told yet
_ROLL_CALL = 5.0  # seconds: a rank on a busy machine is not to be taken for one that does not come
_ANSWER = 5.0  # seconds more: the store may lie beyond a link that is down, where torch waits for it without end
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
    return _answered(_first, "", _GRACE)


def absentees(meeting: str, ranks: Sequence[int]) -> list[int]:
    """Those of these ranks that do not say, a moment after this one, that the same meeting has failed for them, too.

    Whoever waits for messages hears of a failure at once, as connections are closed; whoever does not come, does not.
    """
    keys = {rank: f"mics: rank {rank} misses others in {meeting}, {_start()}" for rank in ranks}
    return _answered(lambda store: _silent(store, keys), [], _ROLL_CALL)


def _first(store: Any) -> str:
    deadline = time.monotonic() + _GRACE
    while not store.check([_key()]):
        if time.monotonic() > deadline:
            return ""
        time.sleep(_PAUSE)
    return str(store.get(_key()).decode(errors="replace"))


def _silent(store: Any, keys: dict[int, str]) -> list[int]:
    deadline = time.monotonic() + _ROLL_CALL
    store.set(keys[_rank], "")
    while not store.check(list(keys.values())) and not store.check([_key()]):  # which names who ended
        if time.monotonic() > deadline:
            return [rank for rank, key in keys.items() if not store.check([key])]
        time.sleep(_PAUSE)
    return []


def _answered(ask: Callable[[Any], T], nothing: T, seconds: float) -> T:
    """What comes of asking the store for so long; nothing if it does not answer: then nobody asks again."""
    global _store
    if _store is None:
        return nothing
    answers: list[T] = []

    def work(store: Any) -> None:
        with suppress(RuntimeError):  # the store is gone with the rank that kept it
            answers.append(ask(store))

    asking = threading.Thread(target=work, args=(_store,), name="mics first cause", daemon=True)
    with suppress(RuntimeError):  # an interpreter that ends starts no thread
        asking.start()
        asking.join(seconds + _ANSWER)
        if asking.is_alive():
            _store = None
    return answers[0] if answers else nothing


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
