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
from queue import SimpleQueue
from typing import Any, TypeVar

import torch.distributed as dist

from mics_core.errors import LostRank

T = TypeVar("T")

_GRACE = 1.0  # seconds: a rank that is ending may not have told yet
_ROLL_CALL = 5.0  # seconds: a rank on a busy machine is not to be taken for one that does not come
_ANSWER = 5.0  # seconds more: the store may lie beyond a link that is down, where torch waits for it without end
_PAUSE = 0.05
_LONGEST = 500  # characters of another rank's sentence

_store: Any = None  # torch does not name the type
_rank = 0
_start = ""
_questions: SimpleQueue[Callable[[], None]] = SimpleQueue()
_asking: threading.Thread | None = None
_failed = False


def remember_store(*, new: bool) -> None:
    """Keep the store of the default process group, which may be gone when it is needed; whether it is new in each start
    of torchrun, whose count of starts differs between nodes.
    """
    global _store, _rank, _start, _questions, _asking
    _store, _rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    _start = "" if new else f", start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if _asking is None or not _asking.is_alive():  # now: a process that is ending starts no threads
        _questions = SimpleQueue()
        _asking = threading.Thread(target=_ask, args=(_questions,), name="mics first cause", daemon=True)
        _asking.start()


def tell_failure(error: BaseException) -> None:
    """Tell the other ranks that this process is about to end by an error that its own program has caught. One that
    nobody catches is told without this.
    """
    global _failed
    _failed = True
    publish(error)


def publish(error: BaseException) -> None:
    """Tell all ranks that this one ends by an error; if another one has told already, that stays."""
    text = " ".join(f"rank {_rank} raised {type(error).__name__}: {error}".split())[:_LONGEST]
    _answered(lambda store: store.compare_set(_key(), "", text), None, 0.0)


def known() -> str:
    """What the first rank told that ended; "" if none has."""
    return _answered(_first, "", _GRACE)


def absentees(meeting: str, ranks: Sequence[int]) -> tuple[int, int] | None:
    """Of these ranks one that does not say, a moment after this one, that the same meeting has failed for it, too; and
    how many do not.

    Whoever waits for messages hears of a failure at once, as connections are closed; whoever does not come, does not.
    """
    return _answered(lambda store: _silent(store, f"mics: {meeting}{_start}", ranks), None, _ROLL_CALL)


def _first(store: Any) -> str:
    deadline = time.monotonic() + _GRACE
    while not store.check([_key()]):
        if time.monotonic() > deadline:
            return ""
        time.sleep(_PAUSE)
    return str(store.get(_key()).decode(errors="replace"))


def _silent(store: Any, meeting: str, ranks: Sequence[int]) -> tuple[int, int] | None:
    deadline = time.monotonic() + _ROLL_CALL
    store.set(f"{meeting}, rank {_rank}", "")
    here = store.add(meeting, 1)  # a counter: thousands of ranks do not ask for thousands of names again and again
    while here < len(ranks) and not store.check([_key()]):  # which names who ended
        if time.monotonic() > deadline:
            return _one_of(store, meeting, ranks), len(ranks) - here
        time.sleep(_PAUSE)
        here = store.add(meeting, 0)
    return None


def _one_of(store: Any, meeting: str, ranks: Sequence[int]) -> int:
    """The first of these ranks that has not come, if one has not."""
    while len(ranks) > 1:
        half = ranks[: len(ranks) // 2]
        ranks = ranks[len(half) :] if store.check([f"{meeting}, rank {rank}" for rank in half]) else half
    return ranks[0]


def _answered(ask: Callable[[Any], T], nothing: T, seconds: float) -> T:
    """What comes of asking the store for so long; nothing if it does not answer: then nobody asks again."""
    global _store, _asking
    if _store is None:
        return nothing
    answers: list[T] = []
    over, store = threading.Event(), _store

    def question() -> None:
        with suppress(RuntimeError):  # the store is gone with the rank that kept it
            answers.append(ask(store))
        over.set()

    _questions.put(question)
    if not over.wait(seconds + _ANSWER):
        _store = _asking = None
    return answers[0] if answers else nothing


def _ask(questions: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        questions.get()()


def blamed(what: str, error: BaseException) -> LostRank:
    """The error of something that needs other ranks: the first cause first, what the network said last."""
    cause = known()
    after = f" after {cause}" if cause else ""
    return LostRank(f"{what} failed on rank {_rank}{after}: {error}")


def _key() -> str:
    return f"mics: why the first rank ended{_start}"


def failed() -> bool:
    """Whether an error ends this process."""
    return _failed or hasattr(sys, "last_value")  # which Python has where nobody caught it


def publish_at_the_end() -> None:
    """Tell what ends the interpreter, if that is an error; called once, when all else that waits at exit is registered.

    What is registered last comes first: the others wait for a second, and lanes and saves may take longer to end.
    """
    atexit.register(_publish_what_ends_us)


def _publish_what_ends_us() -> None:
    error = getattr(sys, "last_value", None)  # what ends the interpreter
    if error is not None:
        publish(error)
