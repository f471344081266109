"""How long the computation stood still for transfers: the part of the communication that nothing hid."""

from __future__ import annotations

import time

import torch

from mics_core.lanes import Ticket

_MANY = 4096  # waits whose events are kept before the finished ones are added up


class Standstill:
    """Waits of the computation, added up.

    On a GPU it is the stream that waits. Two events around each wait measure that, and are there only once somebody has
    asked for it by `reset`.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._asked = not self._on_gpu
        self._past = 0.0
        self._recent: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def wait(self, ticket: Ticket) -> None:
        """Wait for the ticket, and count how long."""
        if not self._asked:
            ticket.wait()
        elif self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            ticket.wait()
            end.record()
            self._recent.append((begin, end))
            if len(self._recent) >= _MANY:
                over = [pair for pair in self._recent if pair[1].query()]  # type: ignore[no-untyped-call]
                self._add_up(over)
        else:
            begun = time.perf_counter()
            ticket.wait()
            self._past += time.perf_counter() - begun

    def seconds(self) -> float:
        """The sum since `reset`. On a GPU the host waits for the last of them."""
        if self._recent:
            self._recent[-1][1].synchronize()
            self._add_up(list(self._recent))
        return self._past

    def _add_up(self, over: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> None:
        """Take in waits that are over, which are the first ones: the stream is a queue."""
        self._past += sum(begin.elapsed_time(end) for begin, end in over) / 1000
        del self._recent[: len(over)]

    def reset(self) -> None:
        """Count from zero."""
        self._asked = True
        self._past = 0.0
        self._recent.clear()
