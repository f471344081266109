"""How long the computation stood still is the sum of its waits, on a clock that the test turns."""

from types import SimpleNamespace

import pytest
import torch

from mics_core.comm import counters
from mics_core.comm.counters import ExposedTime


def test_waits_add_up_until_they_are_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(counters, "time", SimpleNamespace(perf_counter=lambda: now))

    class Work:
        def wait(self) -> None:
            nonlocal now
            now += 0.25

    waits = ExposedTime(torch.device("cpu"))
    for _ in range(3):
        now += 10.0  # the computation
        waits.wait(Work())
    assert waits.seconds() == 0.75
    waits.reset()
    assert waits.seconds() == 0
    waits.wait(Work())
    assert waits.seconds() == 0.25
