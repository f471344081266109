"""Emulated wires beside what they were asked to be: rates, equal shares and round trips, as programs get them.

    python -m bench.wires

Figures of emulated nodes are as good as these. Rounds measure each thing once and begin with another one each time;
figures are their medians. It is the wires that are measured, not how long programs wait for a core: so the programs run
before all others of the machine.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from bench import record
from bench.cluster import Cluster, Link, unavailable
from bench.harness import order

RATE, LATENCY = 100.0, 1.0  # Mbit/s, and ms between two nodes
SLOW = Link(20.0, 50.0, 3.5)
"""Of the last node; the others are alike."""

NODES = 5
LAST = NODES - 1
MBIT = 1e6 / 8  # bytes
TRIPS = 50
PATIENCE = 60.0  # seconds, after which a connection hangs

Pairs = Sequence[tuple[int, int]]
"""Of sender and receiver, all at once."""


@dataclass(frozen=True)
class Asked:
    """What a wire should do, and between what the median of its rounds should lie."""

    what: str
    value: float
    least: float
    most: float

    def kept(self, got: float) -> bool:
        """Whether this figure is the one asked for."""
        return self.least <= got <= self.most


def rate(what: str, mbit: float) -> Asked:
    """So many Mbit/s, within 5 %."""
    return Asked(f"{what}, Mbit/s", mbit, 0.95 * mbit, 1.05 * mbit)


def shares(what: str) -> Asked:
    """Equal ones: the largest is at most 1.1 of the smallest."""
    return Asked(f"{what}, largest share over smallest", 1.0, 1.0, 1.1)


def trip(what: str, ms: float) -> Asked:
    """A round trip of so many ms, within half of one."""
    return Asked(f"{what}, ms", ms, ms - 0.5, ms + 0.5)


@dataclass(frozen=True)
class Measurement:
    """What is measured in one go, and the figures that come of it, in the order of `asked`."""

    asked: tuple[Asked, ...]
    got: Callable[[Cluster, float], list[float]]  # told the seconds that it may look at


def together(what: str, pairs: Pairs) -> Measurement:
    """All connections share a wire of RATE."""

    def got(cluster: Cluster, seconds: float) -> list[float]:
        each = rates(cluster, pairs, seconds)
        return [sum(each), max(each) / min(each)]

    return Measurement((rate(what, RATE), shares(what)), got)


def alone(asked: Sequence[Asked], pairs: Pairs) -> Measurement:
    """No connection shares a wire with another one."""
    return Measurement(tuple(asked), lambda cluster, seconds: rates(cluster, pairs, seconds))


MEASUREMENTS = (
    alone([rate("one connection", RATE)], [(0, 1)]),
    alone([rate(f"both directions at once, {way}", RATE) for way in ("there", "back")], [(0, 1), (1, 0)]),
    alone([rate("from a node with a slower uplink", SLOW.up_mbit)], [(LAST, 0)]),
    alone([rate("to a node with a slower downlink", SLOW.down_mbit)], [(0, LAST)]),
    together("three senders to one node", [(sender, 0) for sender in (1, 2, 3)]),
    together("one sender to three nodes", [(0, receiver) for receiver in (1, 2, 3)]),
    Measurement((trip("round trip", 2 * LATENCY),), lambda cluster, _: [round_trip(cluster, 0, 1)]),
    Measurement(
        (trip("round trip to a farther node", LATENCY + 2 * SLOW.latency_ms),),
        lambda cluster, _: [round_trip(cluster, 0, LAST)],
    ),
)


def connection(cluster: Cluster, sender: int, receiver: int, stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection between two nodes, closed with the stack."""
    with cluster.inside(receiver), socket.create_server((cluster.address(receiver), 0)) as server:
        with cluster.inside(sender):
            out = stack.enter_context(socket.create_connection(server.getsockname(), timeout=PATIENCE))
        into = stack.enter_context(server.accept()[0])
    into.settimeout(PATIENCE)
    out.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    into.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return out, into


def settle(cluster: Cluster) -> None:
    """Wait until the wires carry nothing: what a closed connection left on its way would delay the next one."""
    before, end = None, time.monotonic() + PATIENCE
    while before != (now := cluster.bytes()):
        if time.monotonic() > end:
            raise RuntimeError(f"wires: bytes travel for {PATIENCE:g} s, expected none: close all connections first")
        before = now
        time.sleep(0.05)


def rates(cluster: Cluster, pairs: Pairs, seconds: float) -> list[float]:
    """Mbit/s that programs got in the last `seconds`, all pairs at once."""
    arrived: list[list[tuple[float, int]]] = [[] for _ in pairs]
    done = threading.Event()

    def send(to: socket.socket) -> None:
        while not done.is_set():
            to.send(bytes(1 << 16))

    def receive(at: socket.socket, log: list[tuple[float, int]]) -> None:
        buffer, total = bytearray(1 << 18), 0
        while not done.is_set() and (count := at.recv_into(buffer)):
            total += count
            log.append((time.monotonic(), total))

    def until_done(work: Callable[..., None], *given: Any) -> None:
        try:
            work(*given)
        except OSError:  # of a connection that was shut down under it
            if not done.is_set():
                raise

    with ExitStack() as stack:
        ends = [connection(cluster, *pair, stack) for pair in pairs]
        pool = stack.enter_context(ThreadPoolExecutor(2 * len(ends)))
        both = [pool.submit(until_done, send, out) for out, _ in ends]
        both += [pool.submit(until_done, receive, into, log) for (_, into), log in zip(ends, arrived, strict=True)]
        try:
            time.sleep(0.2 + seconds)  # at first the windows grow
        finally:
            done.set()
            for end in chain.from_iterable(ends):
                with suppress(OSError):  # the other end was faster
                    end.shutdown(socket.SHUT_RDWR)
        for each in both:
            each.result()
    return in_the_last(seconds, arrived)


def in_the_last(seconds: float, arrived: Sequence[Sequence[tuple[float, int]]]) -> list[float]:
    """Mbit/s of each connection while all were open, of the moments at which it had so many bytes in all."""
    last = min(log[-1][0] if log else 0.0 for log in arrived)
    windows = [[each for each in log if last - seconds <= each[0] <= last] for log in arrived]
    if any(len(window) < 2 for window in windows):
        raise RuntimeError(f"wires: a connection got bytes less than twice in {seconds} s: ask for more --seconds")
    return [(w[-1][1] - w[0][1]) / (w[-1][0] - w[0][0]) / MBIT for w in windows]


def round_trip(cluster: Cluster, sender: int, receiver: int) -> float:
    """Milliseconds until a few bytes are answered."""
    with ExitStack() as stack:
        here, there = connection(cluster, sender, receiver, stack)

        def echo() -> None:
            while word := there.recv(64):
                there.send(word)

        pool = stack.enter_context(ThreadPoolExecutor(1))
        echoing = pool.submit(echo)
        trips = []
        for _ in range(TRIPS):
            begun = time.monotonic()
            here.send(b"12345678")
            here.recv(64)
            trips.append(1e3 * (time.monotonic() - begun))
        here.shutdown(socket.SHUT_WR)
        echoing.result()
    return statistics.median(trips)


@contextmanager
def before_all_others() -> Iterator[None]:
    """In here, this thread and those that it starts have a core whenever they want one."""
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, -20)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, usual)


def run(rounds: int, seconds: float) -> dict[str, Any]:
    """Measure everything once in each round; the rows of the table, and how the switch did."""
    got: dict[str, list[float]] = {asked.what: [] for each in MEASUREMENTS for asked in each.asked}
    places = list(map(str, range(len(MEASUREMENTS))))
    with before_all_others(), Cluster(NODES, RATE, LATENCY, links={LAST: SLOW}) as cluster:
        for number in range(rounds):
            for place in order(places, number):
                each = MEASUREMENTS[int(place)]
                settle(cluster)
                for asked, value in zip(each.asked, each.got(cluster, seconds), strict=True):
                    got[asked.what].append(value)
        fidelity = cluster.fidelity()
    rows = [{"asked": asked, "got": got[asked.what]} for each in MEASUREMENTS for asked in each.asked]
    return {"rounds": rounds, "rows": rows, "switch": fidelity}


def wires_table(found: Mapping[str, Any]) -> str:
    """As Markdown, from a record: medians, between what the rounds lie, and whether the median is as asked."""
    texts = []
    for row in found["rows"]:
        asked, got = Asked(**row["asked"]), row["got"]
        median = statistics.median(got)
        texts.append(
            [
                asked.what,
                f"{asked.value:g}",
                f"{median:.2f} ({min(got):.2f}-{max(got):.2f})",
                f"{asked.least:g}-{asked.most:g}",
                "kept" if asked.kept(median) else "missed",
            ]
        )
    return record.table(["", "asked", "got", "goal", ""], texts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and save; missed goals are no failure."""
    parser = argparse.ArgumentParser(prog="python -m bench.wires", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="that a rate is measured for in each; default 0.3")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "cpu" / "wires.json")
    options = parser.parse_args(arguments)
    if reason := unavailable():
        print(f"wires: left out: {reason}")
        return 0
    words = ["python", "-m", "bench.wires", *(sys.argv[1:] if arguments is None else arguments)]
    content = record.plain(record.stamp(words, "cpu") | run(options.rounds, options.seconds))
    print(wires_table(content))
    print(f"saved {record.save(options.out, content)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
