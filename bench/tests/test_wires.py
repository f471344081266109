"""The schedule of the emulated wires: exact, because time is a number here."""

from collections.abc import Sequence

import pytest

from bench.cluster import Link
from bench.cluster.wires import Frame, Network

RATE = 100.0  # Mbit/s
MBIT = 1e6 / 8  # bytes


def frame(source: int, target: int, size: int, flow: int = 0) -> Frame:
    addresses = bytes(12) + bytes((source, target, flow)) + bytes(9)
    return Frame(addresses + bytes(size - len(addresses)), source, target)


def network(nodes: int, latency_ms: float = 1.0, **links: Link) -> Network:
    return Network([links.get(f"node{i}", Link(RATE, RATE, latency_ms / 2)) for i in range(nodes)])


def deliveries(net: Network, step: float = 1.0, until: float = 10.0) -> list[tuple[float, Frame]]:
    return [each for tick in range(int(until / step) + 1) for each in net.advance(tick * step)]


def test_a_frame_takes_its_size_over_the_rate_once_and_the_latency() -> None:
    net = network(2)
    net.enter(frame(0, 1, 12_500), 0.5)
    ((time, arrived),) = deliveries(net)
    assert time == pytest.approx(0.5 + 12_500 / (RATE * MBIT) + 1e-3)
    assert (arrived.target, net.held) == (1, [0, 0])


def test_a_frame_is_as_slow_as_the_slower_of_its_wires() -> None:
    for links in ({"node0": Link(10, RATE, 0.5)}, {"node1": Link(RATE, 10, 0.5)}):
        net = network(2, **links)
        net.enter(frame(0, 1, 12_500), 0.0)
        ((time, _),) = deliveries(net)
        assert time == pytest.approx(10e-3 + 1e-3)


@pytest.mark.parametrize("pairs", [[(0, 1)], [(1, 0), (2, 0), (3, 0)], [(0, 1), (0, 2), (0, 3)]])
def test_the_busiest_wire_carries_exactly_its_rate_in_equal_shares(pairs: Sequence[tuple[int, int]]) -> None:
    net = network(4)
    for _ in range(60):
        for source, target in pairs:
            net.enter(frame(source, target, 12_500), 0.0)
    times = {
        pair: [t for t, f in arrived if (f.source, f.target) == pair] for arrived in [deliveries(net)] for pair in pairs
    }
    last = max(t for each in times.values() for t in each)
    assert last == pytest.approx(len(pairs) * 60 * 1e-3 + 1e-3)
    for each in times.values():
        assert each == sorted(each)
        assert sum(t <= last / 2 for t in each) == pytest.approx(30, abs=1.5)


def test_shares_are_of_bytes_not_of_frames() -> None:
    net = network(2)
    for _ in range(1000):
        net.enter(frame(0, 1, 1_000, flow=1), 0.0)
    for _ in range(100):
        net.enter(frame(0, 1, 10_000, flow=2), 0.0)
    early = [len(f.data) for t, f in deliveries(net) if t < 0.08]
    assert early.count(10_000) * 10_000 == pytest.approx(early.count(1_000) * 1_000, rel=0.05)


def test_a_small_frame_waits_for_one_frame_of_another_flow_and_not_for_its_queue() -> None:
    net = network(2)
    for _ in range(100):
        net.enter(frame(0, 1, 12_500, flow=1), 0.0)
    net.enter(frame(0, 1, 60, flow=2), 0.0005)
    (time,) = [t for t, f in deliveries(net) if len(f.data) == 60]
    assert time < 2 * 1e-3 + 1e-3 + 1e-4


def test_slow_uplinks_fill_a_fast_downlink_together() -> None:
    net = network(4, node0=Link(300, 300, 0.5))
    for source in (1, 2, 3):
        for _ in range(60):
            net.enter(frame(source, 0, 12_500), 0.0)
    assert max(t for t, _ in deliveries(net)) == pytest.approx(60e-3 + 1e-3, rel=0.02)


def test_a_late_caller_changes_nothing() -> None:
    def run(step: float) -> list[tuple[float, int, int]]:
        net = network(3, node2=Link(30, 70, 2))
        for turn in range(40):
            net.enter(frame(turn % 3, (turn + 1) % 3, 1000 + 37 * turn), 0.0)
        return [(t, f.source, len(f.data)) for t, f in deliveries(net, step)]

    assert run(0.0005) == run(10.0)


@pytest.mark.parametrize("wrong", [(0, 1, 1), (1, -1, 1), (1, 1, -1), (1, 1, float("nan")), (float("inf"), 1, 1)])
def test_a_link_that_cannot_be_is_refused(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match=r"^link: \w+ is .*, expected "):
        Link(*wrong)
