"""The kernels' tests run on the GPU if there is one, else in Triton's interpreter, against the torch references."""

from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def _hints_of_alignment_are_true(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tl.multiple_of` is a promise that a GPU relies on, and would crash on; the interpreter lets it pass unread."""
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    def check(handle: Any, name: str, numbers: Any) -> None:
        if name == "tt.divisibility":
            assert (handle.data % numbers[0] == 0).all()
        set_attr(handle, name, numbers)

    set_attr = interpreter.TensorHandle.set_attr
    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", check)


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)
