"""A device in this process: streams are threads, its memory is the host's, and so the real staging runs on a CPU.

The computation's stream is the host itself. What a lane's job asks of torch is done later, by the stream's thread, in
order; new tensors have their shape at once and their numbers then.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mics_core.comm import placement, world
from mics_core.comm.world import World

Ask = Callable[[], object]


class Event:
    def __init__(self) -> None:
        self.happened = threading.Event()

    def record(self, stream: Stream) -> None:
        stream.ask(self.happened.set)


class Stream:
    """The computation's: what it is asked for, the host does at once."""

    def __init__(self, failures: list[BaseException]) -> None:
        self._failures = failures

    def query(self) -> None:
        """As of any stream of CUDA: raises what the device has failed with, on whichever stream that was."""
        if self._failures:
            raise self._failures[0]

    def ask(self, what: Ask) -> None:
        what()

    def wait_event(self, event: Event) -> None:
        self.ask(partial(_happen, event))

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)


class Lane(Stream):
    """A thread; before some things it rests, so that it is late. It does nothing more when the device has failed."""

    def __init__(self, failures: list[BaseException], rests: random.Random) -> None:
        super().__init__(failures)
        self._queue: SimpleQueue[Ask] = SimpleQueue()
        self._rests = rests
        threading.Thread(target=self._work, daemon=True).start()

    def ask(self, what: Ask) -> None:
        self._queue.put(what)

    def _work(self) -> None:
        torch.set_grad_enabled(False)
        while True:
            what = self._queue.get()
            if self._rests.random() < 0.1:
                time.sleep(0.003)
            try:
                if not self._failures:
                    what()
            except BaseException as error:
                self._failures.append(error)


def _happen(event: Event) -> None:
    assert event.happened.wait(300), "nobody records the event"


class Streams:
    """As torch.cuda, where lanes ask for streams and events."""

    Event = Event

    def __init__(self) -> None:
        self.failures: list[BaseException] = []
        self.computation = self._current = Stream(self.failures)

    def current_stream(self, device: torch.device | None = None) -> Stream:  # noqa: ARG002
        return self._current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            if isinstance(stream, Lane):
                with _Later(stream):
                    yield
            else:
                yield
        finally:
            self._current = before


class _Later(TorchDispatchMode):
    def __init__(self, lane: Lane) -> None:
        super().__init__()
        self._lane = lane

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        if any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
            self._lane.ask(partial(func, *args, **kwargs))
            given = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | kwargs
            written = [given[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            return written[0] if len(schema.returns) == 1 else written if schema.returns else None
        result = func(*args, **kwargs)
        given = {t.untyped_storage()._cdata for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        for tensor in tree_flatten(result)[0] if given and "empty" not in schema.name else ():
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._lane.ask(lambda tensor=tensor: tensor.copy_(func(*args, **kwargs)))
        return result


class PretendedDriver:
    def __init__(self, seed: int = 0) -> None:
        self.streams = Streams()
        self.lanes: list[Lane] = []
        self.pinned_bytes: list[int] = []
        self._rests = random.Random(seed)

    def stream(self, *, urgent: bool) -> Lane:  # noqa: ARG002
        self.lanes.append(Lane(self.streams.failures, random.Random(self._rests.random())))
        return self.lanes[-1]

    def pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        memory = torch.zeros(count, dtype=dtype)
        self.pinned_bytes.append(memory.nbytes)
        return memory

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert target.nbytes == source.nbytes
        self.streams.current_stream().ask(partial(target.copy_, source))

    def write(self, number: Tensor, value: int) -> None:
        self.streams.current_stream().ask(partial(number.fill_, value))

    def wait(self, number: Tensor, value: int) -> None:
        self.streams.current_stream().ask(partial(_reach, number, value))

    def complete(self) -> None:
        """As torch.cuda.synchronize."""
        for lane in self.lanes:
            event = Event()
            event.record(lane)
            while not event.happened.wait(0.01):
                lane.query()
        self.streams.computation.query()


def _reach(number: Tensor, value: int) -> None:
    deadline = time.monotonic() + 300
    while number.item() < value:
        assert time.monotonic() < deadline, "nobody writes the number"
        time.sleep(1e-4)


class StagedWorld(World):
    """Ranks that share a device, of which each pretends to have one."""

    def __init__(self, seed: int = 0) -> None:
        driver = PretendedDriver(seed + 100 * dist.get_rank())
        with (
            patch.object(placement, "place", lambda _: "a host, GPU 0"),
            patch.object(world, "CudaDriver", lambda _: driver),
        ):
            super().__init__(None)
        assert self._staging is not None
        self.staging = self._staging
        self.driver = self.staging.driver
        self.streams = self.driver.streams
