"""Work beside the computation, in order: a CUDA stream on a GPU, a thread on a CPU.

A `Ticket` stands for work that was handed in. `ticket.wait()` makes what follows see its result: on a GPU the current
stream waits for an event and the host goes on; on a CPU the caller waits.
"""

from __future__ import annotations

import atexit
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

import torch


class Ticket(Protocol):
    """Work under way."""

    def wait(self) -> None:
        """Let everything after this see the work's result; raises what the work raised."""


class Done:
    """Work that needed no lane."""

    def wait(self) -> None:
        """Nothing to wait for."""


DONE = Done()


class Lane(Protocol):
    """A queue of work beside the computation."""

    def submit(self, job: Callable[[], None], after: Sequence[Ticket] = ()) -> Ticket:
        """Do the job after all jobs before it, after what the caller has done so far, and after these tickets."""


class _HostTicket:
    """Done when its lock is free."""

    def __init__(self) -> None:
        self._running = threading.Lock()
        self._running.acquire()
        self.error: BaseException | None = None

    def finish(self, error: BaseException | None) -> None:
        self.error = error
        self._running.release()

    def wait(self) -> None:
        with self._running:
            pass
        if self.error is not None:
            raise self.error


@dataclass
class _Item:
    job: Callable[[], None]
    after: Sequence[Ticket]
    ticket: _HostTicket

    def run(self, failure: BaseException | None) -> BaseException | None:
        """Do the job; not behind a failure, because ranks agree on what a message is by its place in the order."""
        try:
            for earlier in self.after:
                earlier.wait()
            if failure is None:
                self.job()
        except BaseException as error:  # handed to whoever waits
            failure = error
        self.ticket.finish(failure)
        return failure


class HostLane:
    """A thread. Waiting for the network releases Python's lock, so the computation goes on meanwhile."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: SimpleQueue[_Item | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        _host_lanes.add(self)

    def submit(self, job: Callable[[], None], after: Sequence[Ticket] = ()) -> Ticket:
        """Do the job after all jobs before it and after these tickets."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, args=(self._queue,), name=self._name, daemon=True)
            self._thread.start()
        ticket = _HostTicket()
        self._queue.put(_Item(job, after, ticket))
        return ticket

    # Not a method: a thread that held its lane would keep it, and what its jobs hold, alive for ever.
    @staticmethod
    def _work(queue: SimpleQueue[_Item | None]) -> None:
        torch.set_grad_enabled(False)  # of this thread
        failure: BaseException | None = None
        while (item := queue.get()) is not None:
            failure = item.run(failure)
            item = None  # or the last job's tensors would live until the next one comes

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
    seconds = 1.0 if hasattr(sys, "last_value") else 600.0
    for host_lane in list(_host_lanes):
        host_lane.close(seconds)


class _StreamTicket:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


class StreamLane:
    """A CUDA stream: jobs are issued at once, by the caller, and run on the device in their order."""

    def __init__(self, device: torch.device, priority: int) -> None:
        self._stream = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]

    def submit(self, job: Callable[[], None], after: Sequence[Ticket] = ()) -> Ticket:
        """Issue the job behind what the current stream holds now and behind these tickets."""
        # The caller allocates what a job writes and drops what it has read on its own stream. Behind that stream's
        # present end, no kernel still uses memory that the caller was given again.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), torch.no_grad():
            for earlier in after:
                earlier.wait()
            job()
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return _StreamTicket(event)


def lane(name: str, device: torch.device, *, urgent: bool = False) -> Lane:
    """A lane for the device; an urgent one goes before others where the device can choose."""
    return StreamLane(device, -1 if urgent else 0) if device.type == "cuda" else HostLane(name)
