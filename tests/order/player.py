"""A pretended GPU that does a recording again, in any order that its streams and events allow, in memory that is used
again.

Addresses come from pools as in a caching allocator: what a stream's block gives back, the next one of that stream
takes. They depend on the host's order alone; the order of the work does not. What nobody wrote is NaN, and so is what
was freed. Every result is compared with that of the host's order.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from recording import Recording
from rules import is_refresh, on_purpose
from steps import Act, Block, Place, Step

_ROUND = 512  # bytes of which a block is a multiple
Bytes = dict[int, int]
"""Checksums: by step, of what it wrote or read; below zero, by block, of what was there at the end."""


class _Pools:
    """Addresses, and which of them are used more than once."""

    def __init__(self, recording: Recording) -> None:
        self.address: dict[int, int] = {}
        self.end = 0
        self.reused = 0
        free: dict[str, list[tuple[int, int]]] = {}  # by stream: size and address, the last one given back at the end
        for block in recording.blocks:
            if block.stream is None:
                self.address[block.number] = self._fresh(block.size)
        for step in recording.steps:
            if step.block is None:
                continue
            size = _rounded(step.block.size)
            pool = free.setdefault(step.stream, [])
            if step.act is Act.FREE:
                pool.append((size, self.address[step.block.number]))
                continue
            fitting = [(have - size, -place, place) for place, (have, _) in enumerate(pool) if have >= size]
            if not fitting:
                self.address[step.block.number] = self._fresh(size)
                continue
            have, begin = pool.pop(min(fitting)[2])
            self.address[step.block.number] = begin
            self.reused += 1
            if have > size:
                pool.append((have - size, begin + size))

    def _fresh(self, size: int) -> int:
        begin = self.end
        self.end += _rounded(size)
        return begin


def _rounded(size: int) -> int:
    return -(-max(size, 1) // _ROUND) * _ROUND


class Player:
    """A recording, made ready to be done again and again."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._pools = _Pools(recording)
        self.reused = self._pools.reused
        self._memory = torch.empty(self._pools.end, dtype=torch.uint8)
        self._queues: dict[str, list[Step]] = {stream: [] for stream in recording.streams}
        self._turn: dict[int, tuple[str, int]] = {}
        self._calls: dict[int, tuple[Any, Any, list[Tensor | None], list[Tensor]]] = {}
        for step in recording.steps:
            queue = self._queues[step.stream]
            self._turn[step.number] = step.stream, len(queue)
            queue.append(step)
            leaves = [self._view(leaf) if isinstance(leaf, Place) else leaf for leaf in step.leaves]
            args, kwargs = tree_unflatten(leaves, step.spec) if step.function is not None else ((), {})
            outs = [None if out is None else self._view(out) for out in step.outs]
            told = step.reads if step.act is Act.READ else step.writes
            self._calls[step.number] = args, kwargs, outs, [self._view(place) for place in told]

    def host(self) -> Bytes:
        """The results in the order in which the host asked."""
        return self._play(iter(self._recording.steps))

    def late(self, victim: str, seed: int = 0) -> Bytes:
        """Everything as soon as it can be, in a random order; the victim's work only when somebody waits for it."""
        return self._play(self._late(victim, random.Random(seed)))

    def chance(self, seed: int) -> Bytes:
        """Bursts of random lengths from random streams."""
        return self._play(self._chance(random.Random(seed)))

    def orders(self, chances: int) -> Iterator[tuple[str, Bytes]]:
        """Each stream late in turn, and so many random orders."""
        for stream in self._recording.streams:
            if self._queues[stream]:
                yield f"'{stream}' late", self.late(stream)
        for seed in range(chances):
            yield f"random order {seed}", self.chance(seed)

    def differences(self, chances: int, *, users_write: bool = False) -> list[str]:
        """The orders that give other bytes than the host's, each with its first step that does.

        users_write: while refreshes are under way, of whose bytes nothing but their effect is compared then.
        """
        expected = self.host()
        if users_write:
            steps = self._recording.steps
            expected = {
                number: value for number, value in expected.items() if number < 0 or not is_refresh(steps[number])
            }
        found = []
        for name, given in self.orders(chances):
            wrong = [number for number, value in expected.items() if given[number] != value]
            if wrong:
                first = self._recording.steps[wrong[0]] if wrong[0] >= 0 else None
                told = f"{first.what} on '{first.stream}'" if first else "memory at the end"
                found.append(f"{name}: {len(wrong)} results differ, first {told}")
        return found

    # ---- orders

    def _ready(self, done: dict[str, int], stream: str) -> bool:
        queue = self._queues[stream]
        if done[stream] == len(queue):
            return False
        if queue[done[stream]].act is not Act.WAIT:
            return True
        other, turn = self._turn[queue[done[stream]].until]
        return done[other] > turn

    def _late(self, victim: str, chance: random.Random) -> Iterator[Step]:
        done = dict.fromkeys(self._queues, 0)
        while able := [stream for stream in self._queues if self._ready(done, stream)]:
            others = [stream for stream in able if stream != victim]
            stream = chance.choice(others or able)
            yield self._queues[stream][done[stream]]
            done[stream] += 1
        assert all(done[stream] == len(queue) for stream, queue in self._queues.items()), "streams wait in a circle"

    def _chance(self, chance: random.Random) -> Iterator[Step]:
        done = dict.fromkeys(self._queues, 0)
        streams = list(self._queues)
        while any(done[stream] < len(queue) for stream, queue in self._queues.items()):
            stream = chance.choice(streams)
            for _ in range(chance.choice((1, 3, 10, 100))):
                if not self._ready(done, stream):
                    break
                yield self._queues[stream][done[stream]]
                done[stream] += 1

    # ---- work

    def _view(self, place: Place) -> Tensor:
        begin = self._pools.address[place.block.number] // place.dtype.itemsize + place.offset
        storage = self._memory.untyped_storage()
        return torch.empty(0, dtype=place.dtype).set_(storage, begin, place.size, place.stride)

    def _bytes_of(self, block: Block) -> Tensor:
        begin = self._pools.address[block.number]
        return self._memory[begin : begin + block.size]

    @torch.no_grad()
    def _play(self, order: Iterator[Step]) -> Bytes:
        self._memory.fill_(0xFF)  # NaN
        for block in self._recording.blocks:
            if block.initial is not None:
                self._bytes_of(block).copy_(block.initial)
        results: Bytes = {}
        for step in order:
            if step.act is Act.FREE:
                assert step.block is not None
                self._bytes_of(step.block).fill_(0xFF)
            elif step.act in (Act.OPERATOR, Act.READ) and not on_purpose(step):
                results[step.number] = self._do(step)
        for block in self._recording.blocks:
            if not block.freed:
                results[-1 - block.number] = zlib.crc32(self._bytes_of(block).numpy().tobytes())
        return results

    def _do(self, step: Step) -> int:
        args, kwargs, outs, told = self._calls[step.number]
        said = b""
        if step.function is not None:
            results = tree_flatten(step.function(*args, **kwargs))[0]
            for out, value in zip(outs, results, strict=False):
                if out is not None:
                    out.copy_(value)
            said = repr([value for value in results if not isinstance(value, Tensor)]).encode()
        for tensor in told:
            said += tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        return zlib.crc32(said)
