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
from contextlib import suppress
from typing import Any

import torch.distributed as dist

_GRACE = 1.0  # seconds: a rank that is ending may not have told yet
_ANSWER = 5.0  # seconds: the store may lie beyond a link that is down, where torch waits for it without end
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
    """What the first rank told that ended; "" if none has, or if the store does not answer: then nobody asks again."""
    global _store
    if _store is None:
        return ""
    told: list[str] = []
    asking = threading.Thread(target=_ask, args=(_store, told), name="mics first cause", daemon=True)
    with suppress(RuntimeError):  # an interpreter that ends starts no thread
        asking.start()
        asking.join(_ANSWER)
        if asking.is_alive():
            _store = None
    return told[0] if told else ""


def _ask(store: Any, told: list[str]) -> None:
    deadline = time.monotonic() + _GRACE
    with suppress(RuntimeError):  # the store is gone with the rank that kept it
        while not store.check([_key()]):
            if time.monotonic() > deadline:
                return
            time.sleep(_PAUSE)
        told.append(store.get(_key()).decode(errors="replace"))


def blamed(what: str, error: BaseException) -> RuntimeError:
    """The error of something that needs other ranks: the first cause first, what the network said last."""
    cause = known()
    after = f" after {cause}" if cause else ""
    return RuntimeError(f"{what} failed on rank {_rank}{after}: {error}")


def _key() -> str:
    return f"mics: why the first rank ended, start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def publish_at_the_end() -> None:
    """Tell what ends the interpreter, if that is an error; called once, when all else that waits at exit is registered.

    What is registered last comes first: the others wait for a second, and lanes and saves may take longer to end.
    """
    atexit.register(_publish_what_ends_us)


def _publish_what_ends_us() -> None:
    error = getattr(sys, "last_value", None)  # what ends the interpreter
    if error is not None:
        publish(error)
