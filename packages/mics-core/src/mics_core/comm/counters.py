"""What one model on one rank has sent, moved in memory and waited for."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from threading import Lock
from typing import Protocol

import torch

from mics_core.comm.lanes import Work
from mics_core.spec.formula import Traffic

_MANY = 4096  # waits whose events are kept before the finished ones are added up


class HasBytes(Protocol):
    """What has a number of bytes."""

    @property
    def nbytes(self) -> int:
        """So many."""


class Counters:
    """Added to where it happens: by the computation and by lanes."""

    def __init__(self, device: torch.device) -> None:
        self.exposed = ExposedTime(device)
        self.links: dict[tuple[str, str], Traffic] = defaultdict(Traffic)  # by action and level
        self.memory: dict[str, int] = defaultdict(int)  # bytes read and written, by operation
        self._lock = Lock()

    def sent(self, action: str, level: str, count: int) -> None:
        """A call of `action` on a level, in which this rank sent so many bytes."""
        with self._lock:
            traffic = self.links[action, level]
            traffic.calls += 1
            traffic.bytes += count

    def moved(self, operation: str, count: int) -> None:
        """So many bytes read and written by an operation on local memory."""
        with self._lock:
            self.memory[operation] += count

    def added(self, target: torch.Tensor, parts: Sequence[HasBytes], *, overwrite: bool) -> None:
        """The sum of the parts was added to, or written to, `target`."""
        self.moved("accumulate", parts[0].nbytes + target.nbytes * (1 if overwrite else 2))
        if len(parts) > 1:
            self.moved("reduction", sum(part.nbytes for part in parts[1:]))

    def reduced(self, target: torch.Tensor, parts: Sequence[HasBytes]) -> None:
        """Parts were summed on their way, which NCCL does inside its reduce-scatter."""
        self.moved("reduction", target.nbytes + sum(part.nbytes for part in parts))

    def reset(self) -> None:
        """Count from zero."""
        self.links.clear()
        self.memory.clear()
        self.exposed.reset()


class ExposedTime:
    """How long the computation stood still for transfers: the part of the communication that nothing hid.

    On a GPU it is the stream that waits. Two events around each wait measure that, and are there only once somebody has
    asked for it by `reset`.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._asked = not self._on_gpu
        self._past = 0.0
        self._recent: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def wait(self, work: Work) -> None:
        """Wait for the work, and count how long."""
        if not self._asked:
            work.wait()
        elif self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            work.wait()
            end.record()
            self._recent.append((begin, end))
            if len(self._recent) >= _MANY:
                over = [pair for pair in self._recent if pair[1].query()]  # type: ignore[no-untyped-call]
                self._add_up(over)
        else:
            begun = time.perf_counter()
            work.wait()
            self._past += time.perf_counter() - begun

    def seconds(self) -> float:
        """The sum since `reset`. On a GPU the host waits for the last of them."""
        if self._recent:
            self._recent[-1][1].synchronize()
            self._add_up(list(self._recent))
        return self._past

    def reset(self) -> None:
        """Count from zero."""
        self._asked = True
        self._past = 0.0
        self._recent.clear()

    def _add_up(self, over: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> None:
        """Take in waits that are over, which are the first ones: the stream is a queue."""
        self._past += sum(begin.elapsed_time(end) for begin, end in over) / 1000
        del self._recent[: len(over)]
