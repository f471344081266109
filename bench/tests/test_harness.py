import random
import weakref
from collections import Counter

import pytest
import torch

from bench.harness import WARM_UPS, DeviceTimer, HostTimer, Ratio, Samples, Variant, captured, measure, order
from pretending import Clock, Device


def test_every_name_is_first_as_often_and_once_in_a_round() -> None:
    rounds = [order(["a", "b", "c"], turn) for turn in range(6)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    for place in range(3):
        assert set(Counter(names[place] for names in rounds).values()) == {2}


def test_variants_run_interleaved_behind_their_warm_ups() -> None:
    clock, called = Clock(), []
    variants = {name: Variant(lambda name=name: called.append(name)) for name in "ab"}
    measure(variants, HostTimer(clock), 0.0, rounds=(3, 3), clock=clock)
    assert called == ["a"] * WARM_UPS + ["b"] * WARM_UPS + list("ab" + "ba" + "ab")
    called.clear()
    measure(variants, HostTimer(clock), 0.0, rounds=(3, 3), warm_ups=0, clock=clock)
    assert called == list("ab" + "ba" + "ab")


def test_a_variant_that_takes_twice_as_long_has_the_ratio_two() -> None:
    clock, chance = Clock(), random.Random(0)
    variants = {
        "one": Variant(lambda: clock.spend(1e-3 * chance.uniform(0.9, 1.1))),
        "two": Variant(lambda: clock.spend(2e-3 * chance.uniform(0.9, 1.1))),
    }
    samples = measure(variants, HostTimer(clock), 1.0, clock=clock)
    ratio = samples.ratio("two", "one")
    assert ratio.low < 2 < ratio.high
    assert ratio.value == pytest.approx(2, rel=0.05)
    assert ratio.high - ratio.low < 0.3
    assert samples.fastest(["two", "one"]) == "one"


def test_what_slows_whole_rounds_down_does_not_widen_the_interval() -> None:
    chance = random.Random(0)
    drift = [chance.uniform(1, 3) for _ in range(100)]
    together = Samples({"a": [2 * d for d in drift], "b": drift})
    apart = Samples({"a": [2 * d for d in drift], "b": random.Random(1).sample(drift, 100)})
    assert together.ratio("a", "b").low == pytest.approx(2)
    assert together.ratio("a", "b").high == pytest.approx(2)
    assert apart.ratio("a", "b").high > apart.ratio("a", "b").low + 0.2


def test_an_interval_from_far_below_to_far_above_one_tells_nothing() -> None:
    assert Ratio(1.13, 0.27, 5.64).told() == "1.13 (0.27-5.64) tells nothing"
    assert Ratio(0.51, 0.27, 0.63).told() == "0.51 (0.27-0.63)"
    assert Ratio(1.0, 0.8, 1.2).told(3) == "1.000 (0.800-1.200)"


def test_the_same_samples_have_the_same_interval() -> None:
    samples = Samples({"a": [1.0, 5.0, 2.0], "b": [2.0, 1.0, 4.0]})
    assert samples.ratio("a", "b") == samples.ratio("a", "b")


def test_medians_and_quantiles_are_those_of_the_samples() -> None:
    spread = Samples({"a": [float(n) for n in (10, 0, 9, 1, 8, 2, 7, 3, 6, 4, 5)]}).spread("a")
    assert spread.median == 5
    assert (spread.p10, spread.p20, spread.p80, spread.p90) == pytest.approx((1, 2, 8, 9))
    assert spread.rounds == 11


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 7), (0.04, 20), (9.0, 50)])
def test_time_decides_how_many_rounds_there_are_within_bounds(seconds: float, rounds: int) -> None:
    clock = Clock()
    variants = {name: Variant(lambda: clock.spend(1e-3)) for name in "ab"}
    samples = measure(variants, HostTimer(clock), seconds, rounds=(7, 50), clock=clock)
    assert samples.spread("a").rounds == samples.spread("b").rounds == rounds


def test_rounds_that_take_very_long_are_few() -> None:
    clock = Clock()
    variants = {name: Variant(lambda: clock.spend(2.0)) for name in "ab"}
    assert measure(variants, HostTimer(clock), 1.0, clock=clock).spread("a").rounds == 3


def test_what_a_call_used_up_comes_back_before_each_call_and_costs_nothing() -> None:
    clock, state = Clock(), {"full": False}

    def call() -> None:
        assert state.pop("full")
        clock.spend(1e-3)

    def restore() -> None:
        state["full"] = True
        clock.spend(5.0)

    samples = measure({"a": Variant(call, restore)}, HostTimer(clock), 0.0, clock=clock)
    assert samples.seconds["a"] == pytest.approx([1e-3] * 3)


def test_a_batch_is_timed_to_its_end_and_says_what_one_call_took() -> None:
    clock, queue = Clock(), []

    def finish() -> None:
        clock.spend(1e-3 * len(queue))
        queue.clear()

    queue.append("left over from before")
    timer = HostTimer(clock, calls=10, before=finish, after=finish)
    assert timer.seconds(Variant(lambda: queue.append("call"))) == pytest.approx(1e-3)
    launch = HostTimer(clock, before=finish)
    assert launch.seconds(Variant(lambda: queue.append("call"))) == 0


def test_between_the_events_of_a_device_there_is_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Device(monkeypatch)
    timer = DeviceTimer(torch.device("cpu"), calls=4)
    assert timer._other.numel() >= 3000  # a few times the cache
    before = timer._other.clone()
    variant = Variant(lambda: fake.did.append("call"), lambda: fake.did.append("restore"))
    assert timer.seconds(variant) == pytest.approx(2e-3)
    assert fake.did == ["restore", "sleep True", "event", "call", "event", "wait for event"]
    assert not timer._other.equal(before)  # what was in the cache was overwritten


def test_a_device_waits_longer_for_a_call_that_takes_longer_to_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    Device(monkeypatch)
    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "_sleep", waits.append)
    timer = DeviceTimer(torch.device("cpu"), flush=False)
    variant = Variant(lambda: None)
    timer.seconds(variant)
    timer._queueing[variant] = 1e-3
    timer.seconds(variant)
    timer._queueing[variant] = 100.0
    timer.seconds(variant)
    assert waits[0] <= 60_000
    assert 2_000_000 <= waits[1] <= 4_000_000  # cycles of 0.5 ns
    assert waits[2] <= 100_000_000


def test_a_timer_keeps_no_variant_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    Device(monkeypatch)
    timer, buffer = DeviceTimer(torch.device("cpu"), flush=False), torch.ones(1)
    variant = Variant(buffer.neg_)
    timer.seconds(variant)
    gone = weakref.ref(buffer)
    del variant, buffer
    assert gone() is None


def test_a_graph_is_captured_behind_warm_ups_on_its_stream_and_then_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Device(monkeypatch)
    graph = captured(
        Variant(lambda: fake.did.append("call"), lambda: fake.did.append("restore")), 2, torch.device("cpu")
    )
    warm = ["stream", "wait for stream", "stream", *["call"] * WARM_UPS, "wait for all"]
    assert fake.did == [*warm, "graph", "call", "call", "graph ends"]
    graph.restore()
    graph.call()
    assert fake.did[-2:] == ["restore", "replay"]
