"""Work at a disk, in a thread of its own: a call of the disk may never return, and who waits for it must not hang, too.

Work goes on as long as its threads compute, however little: a call of the disk that returns is seen, one that hangs is
not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


def _own_clock() -> int:
    """The number of the clock of this thread's CPU time; of time itself where the system has none, as macOS: what hangs
    is not told from what is slow there, and waited for.
    """
    find = getattr(time, "pthread_getcpuclockid", None)
    return time.CLOCK_MONOTONIC if find is None else int(find(threading.get_ident()))


_here = threading.local()  # `clocks`: those of the task that this thread works for


class Task(Generic[T]):
    """A job under way, with the gradient mode and the CUDA stream of whoever began it.

    What it begins in turn is a part of it.
    """

    def __init__(self, job: Callable[[], T]) -> None:
        self._job = job
        self._modes = (torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        self._clocks: list[int] = getattr(_here, "clocks", [])  # CPU time of each thread
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._over = threading.Event()
        self._seen: list[float] = []
        self._looks = 0
        # A daemon: what hangs must not keep the process from ending.
        thread = threading.Thread(target=self._run, name="mics disk", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # a process that is ending starts no threads, and its last save is to end well
            self._run()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it is over, after so many seconds at most."""
        return self._over.wait(seconds)

    def result(self) -> T:
        """What the job returned, or its exception, when it is over."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._results[0]

    def looks(self) -> int:
        """How many looks in a row, this one being the last, found it where the look before had found it."""
        spent = []
        for clock in tuple(self._clocks):
            with suppress(OSError):  # a thread that has just ended
                spent.append(time.clock_gettime(clock))
        self._looks = self._looks + 1 if spent == self._seen else 0
        self._seen = spent
        return self._looks

    def _run(self) -> None:
        before, clock = vars(_here).copy(), _own_clock()
        _here.clocks = self._clocks
        self._clocks.append(clock)
        inference, gradients = self._modes
        # Without a stream: torch.cuda.stream(None) would begin to use the GPU.
        stream = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        try:
            with stream, torch.inference_mode(inference), torch.set_grad_enabled(gradients):
                self._results.append(self._job())
        except BaseException as error:  # handed to whoever asks for the result
            self._error = error
        finally:
            self._clocks.remove(clock)
            vars(_here).clear()
            vars(_here).update(before)
            self._over.set()
