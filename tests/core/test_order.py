"""The order of units: recorded, followed, and given up where a pass takes another way."""

import logging

import pytest

from mics_core.unit.order import Direction, Order, Use, log

ROOT, A, B = range(3)
FORWARD = [Use(unit, Direction.FORWARD) for unit in (ROOT, A, B)]
BACKWARD = [Use(unit, Direction.BACKWARD) for unit in (ROOT, B, A)]
PASS = FORWARD + BACKWARD


@pytest.fixture(autouse=True)
def _the_log_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """import-linter, which another test calls, turns off all logs that exist."""
    monkeypatch.setattr(log, "disabled", False)


def recorded() -> Order:
    order = Order(["the root", "a", "b"])
    for use in PASS:
        assert order.reach(use)
        assert not list(order.upcoming(again=True))
    order.end()
    return order


def test_after_one_pass_the_next_is_known() -> None:
    order = recorded()
    assert list(order.upcoming(again=False)) == PASS
    for place, use in enumerate(PASS):
        assert order.reach(use)
        assert list(order.upcoming(again=False)) == PASS[place + 1 :]
        assert list(order.upcoming(again=True)) == PASS[place + 1 :] + PASS


def test_another_way_is_told_once_and_recorded_anew(caplog: pytest.LogCaptureFixture) -> None:
    order = recorded()
    other = [FORWARD[0], FORWARD[2], FORWARD[1]]
    with caplog.at_level(logging.INFO, "mics_core"):
        assert [order.reach(use) for use in other] == [True, False, True]
    (record,) = caplog.records
    assert "the forward of b came, expected the forward of a" in record.message
    assert not list(order.upcoming(again=True))
    order.end()
    assert list(order.upcoming(again=False)) == other


def test_a_forward_without_a_backward_begins_the_pass_again() -> None:
    order = recorded()
    for use in FORWARD:
        order.reach(use)
    assert not order.reach(FORWARD[0])  # what was fetched for the backward is not needed
    assert list(order.upcoming(again=False)) == PASS[1:]


def test_a_shorter_pass_is_the_order_from_then_on() -> None:
    order = recorded()
    for use in PASS[:4]:
        assert order.reach(use)
    order.end()
    assert list(order.upcoming(again=False)) == PASS[:4]


def test_a_longer_pass_is_another_one(caplog: pytest.LogCaptureFixture) -> None:
    order = recorded()
    with caplog.at_level(logging.INFO, "mics_core"):
        assert [order.reach(use) for use in [*PASS, Use(A, Direction.BACKWARD)]] == [True] * 6 + [False]
    assert "the backward of a came, expected the end" in caplog.text


def test_a_pass_that_was_given_up_leaves_the_order_as_it_was() -> None:
    order = recorded()
    order.reach(FORWARD[0])
    order.restart()
    assert list(order.upcoming(again=False)) == PASS
