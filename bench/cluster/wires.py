"""Frames on their way between nodes: when each leaves which wire, as a discrete-event simulation.

A link is two wires: up from the node to the switch, down from the switch to the node. A wire carries one frame at a
time at its rate, and shares that among flows (a flow is one connection in one direction). Nothing is dropped. The
switch cuts through: it begins to send a frame down as soon as the first bit is there. Its frames stand for runs of
the far smaller packets of a real network, which are on both wires at once, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

_FLOW = slice(12, 24)
"""Of an IPv4 packet: both addresses, then both ports; other protocols have something like a flow there, too."""


@dataclass(frozen=True)
class Link:
    """How one node is connected to the switch."""

    up_mbit: float  # a million bits a second, from the node to the switch
    down_mbit: float
    latency_ms: float  # between node and switch, each way; two nodes are as far apart as both their links are long

    def __post_init__(self) -> None:
        for name in ("up_mbit", "down_mbit"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"link: {name} is {getattr(self, name)}, expected a positive number of Mbit/s")
        if not 0 <= self.latency_ms < math.inf:
            raise ValueError(f"link: latency_ms is {self.latency_ms}, expected milliseconds, 0 or more")


class Frame:
    """A packet, and where it is going."""

    __slots__ = ("data", "last_bit", "source", "target")

    def __init__(self, data: bytes, source: int, target: int) -> None:
        self.data = data
        self.source = source
        self.target = target
        self.last_bit = 0.0  # when it will have arrived at the end of the upward wire, latency included


class Wire:
    """One direction of a link: a queue for each flow, and which of their frames is next.

    The next frame is the one that a wire cut into equal shares, one a flow, would finish first (self-clocked fair
    queueing). So an acknowledgement does not stand behind megabytes of somebody else's, as it would not in a host
    with a fair queue, and senders to one node get equal parts of its downlink.
    """

    __slots__ = ("_finished", "_order", "_shares", "_waiting", "busy", "seconds_per_byte")

    def __init__(self, mbit: float) -> None:
        self.seconds_per_byte = 8e-6 / mbit
        self.busy = False  # a frame is on the wire
        self._waiting: list[tuple[float, int, Frame]] = []
        self._shares: dict[bytes, float] = {}  # by flow: bytes until its last frame would be finished
        self._finished = 0.0  # the same, of the frame on the wire
        self._order = count()

    def put(self, frame: Frame) -> None:
        """Queue a frame."""
        flow = frame.data[_FLOW]
        finish = max(self._shares.get(flow, 0.0), self._finished) + len(frame.data)
        self._shares[flow] = finish
        heappush(self._waiting, (finish, next(self._order), frame))

    def take(self) -> Frame | None:
        """The next frame, if any waits."""
        if not self._waiting:
            self._shares.clear()
            self._finished = 0.0
            return None
        self._finished, _, frame = heappop(self._waiting)
        return frame


_ARRIVES, _FREE_UP, _FREE_DOWN, _DELIVERED = range(4)


class Network:
    """All wires. Time is the caller's: events happen at their own exact time, however late `advance` is called."""

    def __init__(self, links: Sequence[Link]) -> None:
        self.links = links
        self._up = [Wire(link.up_mbit) for link in links]
        self._down = [Wire(link.down_mbit) for link in links]
        # One delay stands for both: nobody can tell on which side of the switch it is.
        self._delays = [[1e-3 * (a.latency_ms + b.latency_ms) for b in links] for a in links]
        self._events: list[tuple[float, int, int, int, Frame | None]] = []  # time, order, what, node, frame
        self._order = count()
        self._reached = -math.inf  # until when all has happened
        self.held = [0] * len(links)  # bytes under way, by source

    def next_time(self) -> float:
        """When something will happen next; infinity if nothing is under way."""
        return self._events[0][0] if self._events else math.inf

    def enter(self, frame: Frame, now: float) -> None:
        """A node sends; what has happened already stays, so this happens no earlier than that."""
        self.held[frame.source] += len(frame.data)
        wire = self._up[frame.source]
        wire.put(frame)
        if not wire.busy:
            self._send_up(frame.source, max(now, self._reached))

    def advance(self, now: float) -> list[tuple[float, Frame]]:
        """Let everything happen until `now`: what is delivered, and when it was due."""
        self._reached = max(now, self._reached)
        delivered = []
        events = self._events
        while events and events[0][0] <= now:
            time, _, what, node, frame = heappop(events)
            if what == _FREE_UP:
                self._send_up(node, time)
            elif what == _FREE_DOWN:
                self._send_down(node, time)
            elif frame is not None:  # as it is for the other two
                if what == _ARRIVES:
                    wire = self._down[node]
                    wire.put(frame)
                    if not wire.busy:
                        self._send_down(node, time)
                else:
                    self.held[frame.source] -= len(frame.data)
                    delivered.append((time, frame))
        return delivered

    def _send_up(self, node: int, time: float) -> None:
        wire = self._up[node]
        frame = wire.take()
        wire.busy = frame is not None
        if frame is not None:
            end = time + len(frame.data) * wire.seconds_per_byte
            delay = self._delays[node][frame.target]
            frame.last_bit = end + delay
            self._at(end, _FREE_UP, node, None)
            self._at(time + delay, _ARRIVES, frame.target, frame)

    def _send_down(self, node: int, time: float) -> None:
        wire = self._down[node]
        frame = wire.take()
        wire.busy = frame is not None
        if frame is not None:
            end = time + len(frame.data) * wire.seconds_per_byte
            self._at(end, _FREE_DOWN, node, None)
            # From a slower wire the last bit comes later; meanwhile this wire has room for others' bits.
            self._at(max(end, frame.last_bit), _DELIVERED, node, frame)

    def _at(self, time: float, what: int, node: int, frame: Frame | None) -> None:
        heappush(self._events, (time, next(self._order), what, node, frame))
