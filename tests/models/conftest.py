"""The models' tests: on the CPU, reproducible, and polite on a shared machine."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_the_same_numbers() -> Iterator[None]:
    # These models are too small to gain from threads, which on a busy machine wait for each other most of the time.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
