"""The kernels' tests run on the GPU if there is one, else in Triton's interpreter, against the torch references."""

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined, so before mics_kernels is imported


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


settings.register_profile("kernels", deadline=None, max_examples=40, derandomize=bool(os.environ.get("CI")))
settings.load_profile("kernels")
