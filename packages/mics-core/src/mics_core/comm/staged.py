"""What travels between ranks that share a GPU, where NCCL refuses to work: through the host's memory, by gloo.

It is for tests of many ranks on one GPU, not for speed. Lanes are streams as with NCCL, and a stream is asked for all
of a transfer at once, without the host waiting for any of it:

    the stream                                       a thread of the group
    copies what I send into pinned memory
    writes a number where the thread looks           sees the number, talks to the other ranks,
    waits until the thread has written the number    writes the number where the stream looks
    copies what came to the GPU

A group's stream does one transfer after the other, so that a group needs pinned memory for only one. The thread asks
nothing of the device: a call that waits for the whole device in another thread cannot stop it.
"""

from __future__ import annotations

import atexit
import ctypes
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from mics_core.comm.first_cause import blamed, failed
from mics_core.comm.groups import HostGroup, Membership, Messages
from mics_core.comm.lanes import HostLane, HostWork, StreamLane, Work
from mics_core.errors import ConfigError

_AHEAD = 4
"""Transfers of a group that may be under way. A stream takes about a thousand calls, and the next one then waits inside
CUDA, in some calls with Python's lock: the threads that it waits for would stand still."""
_PAGE = 1024  # numbers
_OPEN = 1 << 30  # more than any number of a transfer
_SHORTEST, _LONGEST = 2e-5, 1e-3  # seconds between two looks at a number
_ASKING = 1.0  # seconds between two questions whether the device has failed

Copies = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Targets and sources, of one size each."""


class Driver(Protocol):
    """What staging asks of a device. All but `pinned` is done by the current stream, in order, and returns at once."""

    streams: Any
    """torch.cuda, or what stands in for it where lanes ask for streams and events."""

    def stream(self, *, urgent: bool) -> Any:
        """A new one."""

    def pinned(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of the host that the device reads and writes by itself."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Between the device and pinned memory, or on the device."""

    def write(self, number: torch.Tensor, value: int) -> None:
        """Write a pinned number, when all before it is written."""

    def wait(self, number: torch.Tensor, value: int) -> None:
        """Let the stream wait until a pinned number is at least so large."""


class CudaDriver:
    """CUDA's own."""

    streams: Any = torch.cuda

    def __init__(self, device: torch.device) -> None:
        self._device = device
        try:
            self._library = ctypes.CDLL("libcuda.so.1")  # while it is in a call, Python goes on
            # The names without _v2 are those of old drivers, which had to be told to allow them.
            self._library.cuStreamWriteValue32_v2  # noqa: B018
            self._library.cuStreamWaitValue32_v2  # noqa: B018
        except (OSError, AttributeError) as error:
            raise ConfigError(
                f"init: ranks share a GPU, which needs a CUDA driver of version 12 or later, and {error}: give every "
                "rank a GPU of its own"
            ) from error

    def stream(self, *, urgent: bool) -> Any:
        """As of any driver."""
        return torch.cuda.Stream(self._device, priority=-1 if urgent else 0)  # type: ignore[no-untyped-call]

    def pinned(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """As of any driver."""
        return torch.zeros(count, dtype=dtype, device="cpu", pin_memory=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """As of any driver."""
        target.copy_(source, non_blocking=True)

    def write(self, number: torch.Tensor, value: int) -> None:
        """As of any driver; what was copied before is seen by whoever sees the number."""
        self._ask("cuStreamWriteValue32_v2", number, value)

    def wait(self, number: torch.Tensor, value: int) -> None:
        """As of any driver."""
        self._ask("cuStreamWaitValue32_v2", number, value)  # flags 0: at least

    def _ask(self, name: str, number: torch.Tensor, value: int) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        status = getattr(self._library, name)(
            ctypes.c_void_p(stream), ctypes.c_uint64(number.data_ptr()), ctypes.c_uint32(value), ctypes.c_uint(0)
        )
        if status != 0:
            raise RuntimeError(f"{name} gives status {status}, expected 0: the driver refuses, or the GPU has failed")


class Staging:
    """What the lanes and groups of one device have in common: its driver, and the first transfer that failed."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.what = "a transfer"
        """What a lane is asked for now; a transfer that fails is called that."""
        self.failure: Exception | None = None
        self.groups: weakref.WeakSet[StagedGroup] = weakref.WeakSet()
        self.lanes: dict[str, StagedLane] = {}  # each knows this: whoever lets go of this clears it
        self.opened = False
        """Whether the process is ending: nothing that has not left the device leaves it any more."""
        self._page = torch.empty(0, device="cpu")
        self._taken = _PAGE
        _all.add(self)

    def lane(self, name: str, *, urgent: bool) -> StagedLane:
        """The lane of this name."""
        if name not in self.lanes:
            self.lanes[name] = StagedLane(self, urgent=urgent)
        return self.lanes[name]

    def check(self) -> None:
        """Raise what the first transfer that failed has raised in its thread."""
        if self.failure is not None:
            raise self.failure

    def settle(self) -> None:
        """Wait until no transfer is under way."""
        for group in list(self.groups):
            group.settle(0)

    def pinned(self, count: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """Pinned memory. To pin may take the whole device, and its streams are not to wait for our threads then."""
        self.settle()
        with torch.inference_mode(False):  # a thread, where no mode of the caller's holds, writes to it
            return self.driver.pinned(count, dtype)

    def numbers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two pinned numbers that are 0: how many transfers have left the device, and how many are over."""
        if self._taken == _PAGE:
            self._page = self.pinned(_PAGE, torch.int32)
            _pages.append(self._page)
            self._taken = 0
        self._taken += 2
        return self._page[self._taken - 2 : self._taken - 1], self._page[self._taken - 1 : self._taken]


_all: weakref.WeakSet[Staging] = weakref.WeakSet()
_pages: list[torch.Tensor] = []  # never given back: a stream may look at a number of a group, or a world, that is gone


@atexit.register
def _open_all() -> None:
    """A process ends only when its streams do, and after an error a transfer may never come.

    Without an error others may need what is under way. That is waited for here, as lanes are asked to end after this.
    """
    stagings = list(_all)
    try:
        for staging in stagings if not failed() else ():
            staging.settle()
    finally:
        for staging in stagings:
            staging.opened = True
        for page in _pages:
            page.fill_(_OPEN)


class _StagedWork:
    def __init__(self, work: Work, staging: Staging) -> None:
        self._work = work
        self._staging = staging

    def wait(self) -> None:
        self._staging.check()
        self._work.wait()


class StagedLane(StreamLane):
    """A stream; its submit, and waiting for its works, raise what any transfer of the device has failed with."""

    def __init__(self, staging: Staging, *, urgent: bool) -> None:
        super().__init__(staging.driver.stream(urgent=urgent), staging.driver.streams)
        self._staging = staging

    def submit(self, what: str, job: Callable[[], None], after: Sequence[Work] = ()) -> Work:
        """As of any lane."""
        self._staging.check()
        self._staging.what = what
        return _StagedWork(super().submit(what, job, after), self._staging)


class StagedGroup:
    """gloo between copies, on the current stream, which must be the same one for all transfers of the group.

    What a failed transfer should have brought is NaN; the error comes with the next submit or wait of any lane.
    """

    def __init__(self, membership: Membership, group: dist.ProcessGroup, staging: Staging) -> None:
        self.membership = membership
        self._staging = staging
        self._host = HostGroup(membership, group)
        self._thread = HostLane(f"mics staging, {membership.name}")
        self._left, self._over = staging.numbers()
        self._slot = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._number = 0
        self._under_way: deque[HostWork] = deque()
        staging.groups.add(self)

    def all_gather(self, out: torch.Tensor, piece: torch.Tensor) -> None:
        """As of any group."""
        size, index = len(self.membership.ranks), self.membership.index
        rows, mine = _bytes(out).view(size, -1), _bytes(piece)
        slot = self._room(rows.numel())
        pieces = slot.view(size, -1)
        back = [(rows[:index], pieces[:index]), (rows[index + 1 :], pieces[index + 1 :])]
        if rows[index].data_ptr() != mine.data_ptr():
            back.append((rows[index], mine))
        self._travel(partial(self._host.all_gather, slot, pieces[index]), [(pieces[index], mine)], back, pieces)

    def exchange(self, source: torch.Tensor) -> list[torch.Tensor]:
        """As of any group: everyone's part, in the order of the ranks, so that sums are those of a CPU's ranks."""
        parts = source.view(len(self.membership.ranks), -1)
        rows = self._host.in_order(parts, torch.empty_like(parts[1:]))
        self.swap([[_bytes(part)] for part in parts], [[_bytes(row)] for row in rows])
        return rows

    def swap(self, leaving: Messages, arriving: Messages) -> None:
        """As of any group."""
        others = [other for other in range(len(self.membership.ranks)) if other != self.membership.index]
        there = {id(message): message for other in others for message in leaving[other]}  # one may be for several
        here = {id(message): message for other in others for message in arriving[other]}
        slot = self._room(sum(message.nbytes for message in (*there.values(), *here.values())))
        staged, end = {}, 0
        for key, message in (there | here).items():
            staged[key] = slot[end : end + message.numel()]
            end += message.numel()
        talk = partial(
            self._host.swap,
            [[staged.get(id(message), message) for message in messages] for messages in leaving],
            [[staged.get(id(message), message) for message in messages] for messages in arriving],
        )
        out = [(staged[key], message) for key, message in there.items()]
        back = [(message, staged[key]) for key, message in here.items()]
        came = slot[sum(message.numel() for message in there.values()) :]
        self._travel(talk, out, back, came)

    def settle(self, most: int) -> None:
        """Wait until at most so many transfers are under way; raises what the device has failed with."""
        while len(self._under_way) > most:
            while not self._under_way[0].over(_ASKING):  # nor will it ever be if the device has failed
                self._staging.driver.streams.current_stream().query()
            self._under_way.popleft().wait()

    def _room(self, count: int) -> torch.Tensor:
        if self._slot.numel() < count:
            self._slot = self._staging.pinned(count)
        return self._slot[:count]

    def _travel(self, talk: Callable[[], None], out: Copies, back: Copies, coming: torch.Tensor) -> None:
        self._staging.check()
        self.settle(_AHEAD - 1)
        driver = self._staging.driver
        self._number += 1
        for target, source in out:
            driver.copy(target, source)
        driver.write(self._left, self._number)
        what = self._staging.what
        job = partial(self._carry, self._number, what, talk, coming)
        self._under_way.append(self._thread.submit(what, job))
        driver.wait(self._over, self._number)
        for target, source in back:
            if target.numel():
                driver.copy(target, source)

    def _carry(self, number: int, what: str, talk: Callable[[], None], coming: torch.Tensor) -> None:
        """On the thread: one transfer, once its bytes have left the device; none after a failure, or at the end."""
        came = False
        try:
            pause = _SHORTEST
            while self._left.item() < number and not self._staging.opened:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST)
            if self._staging.failure is None and not self._staging.opened:
                talk()
                came = True
        except Exception as error:  # raised by the next submit or wait
            if self._staging.failure is None:
                self._staging.failure = blamed(what, error)
        finally:
            if not came:
                coming.fill_(0xFF)
            self._over.fill_(number)
            if self._staging.opened:  # perhaps just now, by the host: the number is not to be less again
                self._over.fill_(_OPEN)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
