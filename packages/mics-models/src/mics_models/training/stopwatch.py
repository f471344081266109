"""How long a part of a step takes on the device, without making the host wait for it in every step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up what runs inside `part`."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._past = 0.0
        self._recent: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self) -> Iterator[None]:
        """Count what is inside."""
        if not self._on_gpu:
            begun = time.perf_counter()
            yield
            self._past += time.perf_counter() - begun
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        yield
        end.record()
        self._recent.append((begin, end))

    def lap(self) -> float:
        """Seconds since the last lap; on a GPU the host waits for the end of the last part."""
        if self._recent:
            self._recent[-1][1].synchronize()
            self._past += sum(begin.elapsed_time(end) for begin, end in self._recent) / 1000
            self._recent.clear()
        lap, self._past = self._past, 0.0
        return lap
