"""What ranks tell each other of a step, and how a run is asked to leave."""

import math
import signal
from types import SimpleNamespace

import pytest
import torch

from mics_models.training import interrupts
from mics_models.training import stopwatch as stopwatch_module
from mics_models.training.interrupts import Interrupts
from mics_models.training.news import Exchange, Stop
from mics_models.training.peak import peak
from mics_models.training.stopwatch import Stopwatch

CPU = torch.device("cpu")


def test_news_are_those_of_the_step_that_was_sent_last_and_are_read_once() -> None:
    exchange = Exchange(CPU)
    assert exchange.read() is None
    exchange.send(torch.tensor([1.0, 3.0]), torch.tensor(7.0), Stop.NO)
    news = exchange.read()
    assert news is not None
    assert (news.loss, news.norm, news.bad, news.stop) == (2.0, 7.0, (), Stop.NO)
    assert exchange.read() is None


def test_what_is_not_finite_is_named_by_micro_step_and_rank() -> None:
    exchange = Exchange(CPU)
    exchange.send(torch.tensor([1.0, math.inf, math.nan]), torch.tensor(math.nan), Stop.TIME)
    news = exchange.read()
    assert news is not None
    assert news.bad == ((1, 0), (2, 0))
    assert math.isnan(news.norm)
    assert news.stop is Stop.TIME


def test_the_first_signal_is_remembered_and_its_echo_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "ECHOES", 1e9)
    with Interrupts() as asked:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert asked.received is signal.SIGTERM


def test_a_later_signal_does_what_it_would_have_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "ECHOES", -1.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs do not have
    try:
        with Interrupts() as asked:
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            assert asked.received is signal.SIGTERM
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    with Interrupts():
        assert [signal.getsignal(number) for number in interrupts.SIGNALS] != before
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before


def test_the_peak_is_what_it_is_told_or_measured() -> None:
    assert peak(CPU, torch.float32, 3.0).flops == 3e12
    measured = peak(CPU, torch.float32, 0.0)
    assert measured.flops > 0
    assert measured.source == "a measured matrix product"


def test_a_lap_is_the_sum_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(stopwatch_module, "time", SimpleNamespace(perf_counter=lambda: now))
    stopwatch = Stopwatch(CPU)
    for _ in range(2):
        with stopwatch.part():
            now += 0.25
        now += 10.0
    assert stopwatch.lap() == 0.5
    assert stopwatch.lap() == 0
