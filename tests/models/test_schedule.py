"""The learning rate rises, stays or falls, and ends where it is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mics_models.training.schedule import rate
from mics_models.training.settings import ScheduleSettings

SCHEDULES = st.builds(
    ScheduleSettings,
    steps=st.integers(1, 500),
    kind=st.sampled_from(["cosine", "wsd"]),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
    last=st.floats(0, 1),
)


@given(SCHEDULES)
def test_it_rises_to_one_and_never_rises_again(schedule: ScheduleSettings) -> None:
    rates = [rate(step, schedule) for step in range(schedule.steps)]
    assert all(0 < each <= 1 or each == schedule.last == 0 for each in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert top <= max(1, round(schedule.warmup * schedule.steps))


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_it_ends_near_the_last_rate(kind: str) -> None:
    schedule = ScheduleSettings(steps=1000, kind=kind, last=0.1)
    assert rate(999, schedule) == pytest.approx(0.1, abs=0.01)


def test_wsd_stays_until_its_decay() -> None:
    schedule = ScheduleSettings(steps=100, kind="wsd", warmup=0.1, decay=0.2, last=0.0)
    assert {rate(step, schedule) for step in range(10, 81)} == {1.0}
    assert rate(90, schedule) == pytest.approx(0.5)
