"""A clock and a GPU that are not there: what is told to them is what happened."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch


class Clock:
    """Time passes only when somebody spends it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


class Device:
    """torch.cuda as far as the harness uses it, and a list of what it was asked to do."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.did: list[str] = []
        for name in ("device", "stream", "graph"):
            patch.setattr(torch.cuda, name, self.context(name))
        for name in ("Event", "Stream", "CUDAGraph"):
            patch.setattr(torch.cuda, name, lambda *_, **__: self)
        patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1000))
        patch.setattr(torch.cuda, "current_stream", lambda _: "current")
        patch.setattr(torch.cuda, "synchronize", lambda _: self.did.append("wait for all"))
        patch.setattr(torch.cuda, "_sleep", lambda cycles: self.did.append(f"sleep {cycles > 0}"))

    def context(self, name: str) -> object:
        @contextmanager
        def enter(*_: object, **__: object) -> object:
            if name != "device":
                self.did.append(name)
            yield
            if name == "graph":
                self.did.append("graph ends")

        return enter

    def record(self) -> None:
        self.did.append("event")

    def synchronize(self) -> None:
        self.did.append("wait for event")

    def elapsed_time(self, _: object) -> float:
        return 8.0  # milliseconds

    def wait_stream(self, _: object) -> None:
        self.did.append("wait for stream")

    def replay(self) -> None:
        self.did.append("replay")
