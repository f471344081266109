"""Work beside the computation, in order: a CUDA stream on a GPU, a thread on a CPU.

`submit` returns a `Work`. After `work.wait()` the caller sees the result: on a GPU the current stream waits for an
event and the host goes on; on a CPU the caller waits.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Protocol

import torch

from mics_core.comm.first_cause import blamed, failed


class Work(Protocol):
    """A job under way."""

    def wait(self) -> None:
        """Let everything after this see the job's result; raises what the job raised."""


class Lane(Protocol):
    """A queue of jobs beside the computation."""

    def submit(self, what: str, job: Callable[[], None], after: Sequence[Work] = ()) -> Work:
        """Do the job after all jobs before it, after what the caller has done so far, and after this work.

        An error of the job tells `what` it was.
        """


class Done:
    """Work that needed no lane."""

    def wait(self) -> None:
        """Nothing to wait for."""


DONE = Done()


def _do(what: str, job: Callable[[], None]) -> None:
    try:
        job()
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:  # of this rank's device
        error.add_note(f"in the {what}")
        raise
    except RuntimeError as error:
        raise blamed(what, error) from error


class HostWork:
    """A job of a thread, over when its lock is free."""

    def __init__(self, what: str, job: Callable[[], None], after: Sequence[Work]) -> None:
        self._what = what
        self._job: Callable[[], None] | None = job
        self._after = after
        self._running = threading.Lock()
        self._running.acquire()
        self._error: BaseException | None = None

    def run(self, failure: BaseException | None) -> BaseException | None:
        """Do the job, or skip it after a failure: ranks match messages by their order alone."""
        try:
            for earlier in self._after:
                earlier.wait()
            if failure is None and self._job is not None:
                _do(self._what, self._job)
        except BaseException as error:  # handed to whoever waits
            failure = error
        self._error = failure
        self._job, self._after = None, ()  # the tensors that the job knows are not to live as long as its work
        self._running.release()
        return failure

    def over(self, seconds: float) -> bool:
        """Wait so long for the job; whether it is over."""
        if not self._running.acquire(timeout=seconds):
            return False
        self._running.release()
        return True

    def wait(self) -> None:
        """As of any work."""
        with self._running:
            pass
        if self._error is not None:
            raise self._error


class HostLane:
    """A thread. Waiting for the network releases Python's lock, so the computation goes on meanwhile."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: SimpleQueue[HostWork | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        _host_lanes.add(self)

    def submit(self, what: str, job: Callable[[], None], after: Sequence[Work] = ()) -> HostWork:
        """As of any lane."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, args=(self._queue,), name=self._name, daemon=True)
            self._thread.start()
        work = HostWork(what, job, after)
        self._queue.put(work)
        return work

    # Not a method: a thread that held its lane would keep the lane, and what its jobs hold, alive for ever.
    @staticmethod
    def _work(queue: SimpleQueue[HostWork | None]) -> None:
        torch.set_grad_enabled(False)  # of this thread
        failure: BaseException | None = None
        while (work := queue.get()) is not None:
            failure = work.run(failure)

    def close(self, seconds: float) -> None:
        """Let the thread end after the jobs it has; wait so long for it."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(seconds)

    def __del__(self) -> None:
        self._queue.put(None)


_host_lanes: weakref.WeakSet[HostLane] = weakref.WeakSet()


@atexit.register
def _finish_lanes() -> None:
    """Wait for transfers under way: a thread inside one when the interpreter goes aborts the process.

    After an error a transfer may never end, and the launcher should hear of the error soon.
    """
    seconds = 1.0 if failed() else 600.0
    for host_lane in list(_host_lanes):
        host_lane.close(seconds)


class _StreamWork:
    def __init__(self, event: Any, streams: Any) -> None:
        self._event = event
        self._streams = streams

    def wait(self) -> None:
        self._streams.current_stream().wait_event(self._event)


class StreamLane:
    """A CUDA stream: jobs are issued at once, by the caller, and run on the device in their order.

    streams: torch.cuda, or what takes notes in its place.
    """

    def __init__(self, stream: Any, streams: Any) -> None:
        self._stream = stream
        self._streams = streams

    def submit(self, what: str, job: Callable[[], None], after: Sequence[Work] = ()) -> Work:
        """As of any lane."""
        # The caller allocates what a job writes and drops what it has read on its own stream. Behind that stream's
        # present end, no kernel still uses memory that the caller was given again.
        self._stream.wait_stream(self._streams.current_stream())
        with self._streams.stream(self._stream), torch.no_grad():
            for earlier in after:
                earlier.wait()
            _do(what, job)
            event = self._streams.Event()
            event.record(self._stream)
        return _StreamWork(event, self._streams)


def lane(name: str, device: torch.device, *, urgent: bool = False) -> Lane:
    """A lane for the device; an urgent one goes before others where the device can choose."""
    if device.type != "cuda":
        return HostLane(name)
    stream = torch.cuda.Stream(device, priority=-1 if urgent else 0)  # type: ignore[no-untyped-call]
    return StreamLane(stream, torch.cuda)
