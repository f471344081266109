"""Where a part runs, and what it writes down: on the GPU, or with the CPU in its place, so that it can be tried."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.record import plain

CYCLES = 1.7e9
"""Of a GPU's clock in a second, about."""


@dataclass(frozen=True)
class Stand:
    """A GPU, or a CPU that pretends to be one: it has no streams, and waits for nothing."""

    device: torch.device
    notes: Path  # a JSON line for each finding

    @property
    def pretends(self) -> bool:
        """Whether the CPU stands for a GPU."""
        return self.device.type == "cpu"

    def small(self, size: int, pretended: int) -> int:
        """A size, and the one that is enough to try the code."""
        return pretended if self.pretends else size

    def sleep(self, seconds: float) -> None:
        """Keep the current stream busy."""
        if not self.pretends:
            torch.cuda._sleep(int(seconds * CYCLES))  # type: ignore[no-untyped-call]

    def complete(self) -> None:
        """Wait for all streams."""
        if not self.pretends:
            torch.cuda.synchronize(self.device)

    def stream(self, priority: int = 0) -> Any:
        """A new stream."""
        return None if self.pretends else torch.cuda.Stream(self.device, priority=priority)  # type: ignore[no-untyped-call]

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """What is asked inside, this stream does, after all that the current one was asked for."""
        if stream is None:
            return nullcontext()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(stream)

    def join(self, stream: Any) -> None:
        """What comes next on the current stream comes after this one's work."""
        if stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(stream)

    def memory(self) -> tuple[int, int]:
        """Bytes in use, and bytes that the allocator has taken from the device."""
        if self.pretends:
            return 0, 0
        return torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)

    def peak(self) -> int:
        """The most bytes in use since `forget_peak`."""
        return 0 if self.pretends else torch.cuda.max_memory_allocated(self.device)

    def forget_peak(self) -> None:
        """Let the peak be what is in use now."""
        if not self.pretends:
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextmanager
    def without_syncs(self) -> Iterator[None]:
        """Inside, a wait of the host for the device is an error."""
        if self.pretends:
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def seconds(self, work: Callable[[], object]) -> float:
        """How long it takes, to its end on the device."""
        self.complete()
        begun = time.perf_counter()
        work()
        self.complete()
        return time.perf_counter() - begun

    def write(self, name: str, found: Any) -> None:
        """Write a finding down at once: a killed process leaves what it had."""
        line = json.dumps({"name": name, "found": plain(found)})
        with self.notes.open("a") as file:
            file.write(line + "\n")
        print(f"  {name}: {str(found)[:300]}", file=sys.stderr, flush=True)


Question = Callable[[Stand], Any]


def ask(stand: Stand, questions: Sequence[Question]) -> bool:
    """Each on its own: the error of one is a finding, and the next is asked; whether none has raised."""
    right = True
    for question in questions:
        begun = time.perf_counter()
        try:
            found: Any = question(stand)
        except Exception:
            found, right = {"raised": traceback.format_exc()[-2000:]}, False
        stand.write(question.__name__, {"answer": found, "seconds": time.perf_counter() - begun})
    return right


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Of a part's program."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("notes", type=Path, help="file for the findings")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which a part is ended; default 600")
    parser.add_argument("--pretend", action="store_true", help="with the CPU in the GPU's place, and small")
    return parser


def stand(options: argparse.Namespace) -> Stand:
    """Where this process runs."""
    if not options.pretend and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here: try it with --pretend")
    return Stand(torch.device("cpu") if options.pretend else torch.device("cuda", 0), options.notes)


@contextmanager
def pretended_ranks(size: int, rank: int) -> Iterator[None]:
    """Collectives that move nothing: enough for streams, memory and what the host waits for."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def environment(**names: str) -> Iterator[None]:
    """Inside, the process has these in its environment."""
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
