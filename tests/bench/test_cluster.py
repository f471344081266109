"""The emulated cluster as programs see it: rates, delays, counters and torchrun."""

import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from bench.cluster import Cluster, Link, unavailable

RATE = 100.0  # Mbit/s
MBIT = 1e6 / 8  # bytes
REASON = unavailable()
real = pytest.mark.skipif(REASON is not None, reason=REASON or "")


def test_nodes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="0 nodes, expected 1 to 250"):
        Cluster(0, RATE, 1)
    with pytest.raises(ValueError, match=r"links of nodes \[2\], expected nodes 0 to 1"):
        Cluster(2, RATE, 1, links={2: Link(1, 1, 1)})
    with pytest.raises(RuntimeError, match="not running"):
        Cluster(2, RATE, 1).bytes()


def test_a_machine_that_cannot_emulate_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert unavailable() == "emulated nodes need root"
    with pytest.raises(RuntimeError, match="need root"), Cluster(2, RATE, 1):
        pass


# The real thing: never faster than asked, and as fast as asked in the best of three, for machines are busy.


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(4, RATE, 1.0, links={3: Link(20, 50, 3.5)}) as running:
        yield running


@pytest.fixture
def prompt() -> Iterator[None]:
    """Before all others on a busy machine: it is the wires that are measured, not how long programs wait for a core."""
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, -20)  # of this thread, and of those that it will start
    yield
    os.setpriority(os.PRIO_PROCESS, 0, usual)


def connection(cluster: Cluster, sender: int, receiver: int, stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    with cluster.inside(receiver), socket.create_server((cluster.address(receiver), 0)) as server:
        with cluster.inside(sender):
            out = stack.enter_context(socket.create_connection(server.getsockname(), timeout=20))
        into = stack.enter_context(server.accept()[0])
    into.settimeout(20)
    out.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    into.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return out, into


def rates(cluster: Cluster, pairs: Sequence[tuple[int, int]], seconds: float = 1.0) -> list[float]:
    """Mbit/s that programs got, all pairs at once."""
    arrived: list[list[tuple[float, int]]] = [[] for _ in pairs]
    done = threading.Event()

    def send(to: socket.socket) -> None:
        with suppress(OSError):  # the other end closes first
            while not done.is_set():
                to.send(bytes(1 << 16))

    def receive(at: socket.socket, log: list[tuple[float, int]]) -> None:
        buffer, total = bytearray(1 << 18), 0
        while not done.is_set() and (count := at.recv_into(buffer)):
            total += count
            log.append((time.monotonic(), total))

    with ExitStack() as stack:
        ends = [connection(cluster, *pair, stack) for pair in pairs]
        senders = [threading.Thread(target=send, args=[out]) for out, _ in ends]
        receivers = [threading.Thread(target=receive, args=[i, log]) for (_, i), log in zip(ends, arrived, strict=True)]
        for thread in senders + receivers:
            thread.start()
        time.sleep(0.2 + seconds)
        done.set()
        for thread in receivers:  # they see it when they get their next bytes
            thread.join()
        for both in ends:
            for end in both:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        for thread in senders:
            thread.join()
    last = min(log[-1][0] for log in arrived)
    windows = [[each for each in log if last - seconds <= each[0] <= last] for log in arrived]
    return [(w[-1][1] - w[0][1]) / (w[-1][0] - w[0][0]) / MBIT for w in windows]


def best_of_three(cluster: Cluster, pairs: Sequence[tuple[int, int]], good: Callable[[list[float]], bool]) -> None:
    """Whether the rates are good at least once; `good` itself asserts what must hold each time."""
    tries: list[list[float]] = []
    while not (tries and good(tries[-1])):
        assert len(tries) < 3, f"got {tries} Mbit/s"
        tries.append(rates(cluster, pairs))


@real
@pytest.mark.usefixtures("prompt")
@pytest.mark.parametrize(
    ("pairs", "asked"),
    [
        ([(0, 1)], [RATE]),
        ([(0, 1), (1, 0)], [RATE, RATE]),  # full duplex
        ([(3, 0)], [20.0]),  # the override, up
        ([(0, 3)], [50.0]),  # and down
    ],
)
def test_a_connection_gets_the_rate(cluster: Cluster, pairs: list[tuple[int, int]], asked: list[float]) -> None:
    def good(got: list[float]) -> bool:
        # Above it, too, may be the machine's fault: a receiver that waited for a core takes what piled up at once.
        return all(0.95 * want <= one <= 1.05 * want for one, want in zip(got, asked, strict=True))

    best_of_three(cluster, pairs, good)


@real
@pytest.mark.usefixtures("prompt")
@pytest.mark.parametrize("turn", [1, -1], ids=["many to one", "one to many"])
def test_connections_share_a_wire_equally_and_use_all_of_it(turn: int) -> None:
    def good(got: list[float]) -> bool:
        return 0.95 * RATE <= sum(got) <= 1.05 * RATE and max(got) <= 1.1 * min(got)

    with Cluster(4, RATE, 1.0) as cluster:
        best_of_three(cluster, [(sender, 0)[::turn] for sender in (1, 2, 3)], good)


@real
@pytest.mark.usefixtures("prompt")
@pytest.mark.parametrize(("other", "asked"), [(1, 2.0), (3, 8.0)])  # to node 3: 0.5 and 3.5 ms each way
def test_a_round_trip_takes_twice_the_latency(cluster: Cluster, other: int, asked: float) -> None:
    tries = []
    for _ in range(3):
        with ExitStack() as stack:
            here, there = connection(cluster, 0, other, stack)

            def echo(at: socket.socket) -> None:
                while word := at.recv(64):
                    at.send(word)

            thread = threading.Thread(target=echo, args=[there])
            thread.start()
            trips = []
            for _ in range(100):
                begun = time.monotonic()
                here.send(b"12345678")
                here.recv(64)
                trips.append(1e3 * (time.monotonic() - begun))
            here.shutdown(socket.SHUT_WR)
            thread.join()
        tries.append(statistics.quantiles(trips, n=10)[0])  # in the others, programs waited for a core
        assert tries[-1] > asked - 0.5, tries
        if tries[-1] < asked + 0.5:
            return
    pytest.fail(f"got {tries} ms, expected {asked}")


@real
def test_counters_hold_what_was_sent(cluster: Cluster) -> None:
    size = 5_000_000
    time.sleep(0.3)  # what other tests left on the wires
    before = cluster.bytes()
    with ExitStack() as stack:
        out, into = connection(cluster, 1, 2, stack)
        thread = threading.Thread(target=out.sendall, args=[bytes(size)])
        thread.start()
        left = size
        while left:
            left -= len(into.recv(left))
        thread.join()
    time.sleep(0.1)  # the last acknowledgement
    moved = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, cluster.bytes(), strict=True)]
    assert size < moved[1][0] < 1.03 * size
    assert moved[1] == moved[2][::-1]
    assert moved[2][0] < 0.03 * size
    assert moved[0] == moved[3] == (0, 0)
    assert cluster.fidelity().dropped == 0


@real
def test_torchrun_runs_unchanged(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "reduce.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "numbers = torch.full((250_000,), float(dist.get_rank()))\n"
        "dist.all_reduce(numbers)\n"
        "print('sum', numbers.unique().tolist(), flush=True)\n"
        "dist.destroy_process_group()\n"
    )
    run = cluster.torchrun([str(script)], timeout=120)
    assert all("sum [6.0]" in output for output in run.outputs), run.outputs
    assert all(1.5e6 < traffic.sent < 2.5e6 for traffic in run.traffic), run.traffic  # 2 x 3/4 of a million bytes


@real
def test_programs_have_the_environment_and_a_node_of_their_own(cluster: Cluster) -> None:
    own = (
        "import os; from bench.cluster import traffic; traffic(); print(os.readlink('/proc/self') == str(os.getpid()))"
    )
    programs = [["sh", "-c", "echo $GLOO_SOCKET_IFNAME $OMP_NUM_THREADS $MORE"], [sys.executable, "-c", own]]
    assert cluster.run(programs, env={"MORE": "more"}).outputs == ["wire 1 more\n", "True\n"]
