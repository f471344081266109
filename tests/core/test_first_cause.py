"""What ranks ask the store for when others are gone; the store may be gone, too."""

import threading
from typing import Any

import pytest
import torch.distributed as dist

from mics_core.comm import first_cause


class Silent:
    """A store beyond a link that is down: what is asked of it never comes back."""

    def __init__(self) -> None:
        self.up = threading.Event()

    def check(self, *_: Any) -> bool:
        self.up.wait()
        raise RuntimeError("Broken pipe")

    compare_set = get = check


@pytest.mark.parametrize("asked_before", [True, False])
def test_a_store_that_does_not_answer_holds_no_rank(monkeypatch: pytest.MonkeyPatch, asked_before: bool) -> None:
    store = Silent()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(first_cause, "_ANSWER", 0.1)
    monkeypatch.setattr(first_cause, "_store", None)  # and whose thread asks, as before, at the end
    monkeypatch.setattr(first_cause, "_asking", None)
    first_cause.remember_store(new=True)
    said: list[str] = []

    def fail() -> None:
        if asked_before:
            said.append(str(first_cause.blamed("gather of blocks.1", RuntimeError("timed out"))))
        first_cause.publish(RuntimeError("timed out"))
        said.append("ended")

    failing = threading.Thread(target=fail, daemon=True)
    failing.start()
    failing.join(10)
    store.up.set()
    assert said == ["gather of blocks.1 failed on rank 0: timed out"] * asked_before + ["ended"]
