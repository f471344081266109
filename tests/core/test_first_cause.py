"""What ranks ask the store for when others are gone; the store may be gone, too."""

import threading
from typing import Any

import pytest

from mics_core import first_cause


class Silent:
    """A store beyond a link that is down: what is asked of it never comes back."""

    def __init__(self) -> None:
        self.up = threading.Event()

    def check(self, *_: Any) -> bool:
        self.up.wait()
        raise RuntimeError("Broken pipe")

    compare_set = get = check


def test_a_store_that_does_not_answer_holds_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Silent()
    monkeypatch.setattr(first_cause, "_store", store)
    monkeypatch.setattr(first_cause, "_ANSWER", 0.1, raising=False)
    said: list[str] = []

    def fail() -> None:
        said.append(str(first_cause.blamed("gather of blocks.1", RuntimeError("timed out"))))
        first_cause.publish(RuntimeError("timed out"))
        said.append("ended")

    failing = threading.Thread(target=fail, daemon=True)
    failing.start()
    failing.join(10)
    store.up.set()
    assert said == ["gather of blocks.1 failed on rank 0: timed out", "ended"]
