"""What test_pool.py asks ranks to do."""

import os
import random
import sys
import time
import warnings
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor


class TwoArguments(Exception):
    """As many an exception, it cannot be pickled: its arguments are not those of its constructor."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(f"{name} {number}")


def nothing() -> None:
    pass


def echo(value: object) -> object:
    return value


def reduce_ranks() -> tuple[int, int, float]:
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item()


def large(elements: int) -> Tensor:
    return torch.full((elements,), dist.get_rank(), dtype=torch.bfloat16)


def reduce_in_subgroups() -> float:
    """In pairs, and then across the pairs."""
    rank, world = dist.get_rank(), dist.get_world_size()
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    across = [dist.new_group(list(range(side, world, 2))) for side in range(2)]
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total, group=pairs[rank // 2])
    dist.all_reduce(total, group=across[rank % 2])
    return total.item()


def environment(*names: str) -> list[str | None]:
    return [os.environ.get(name) for name in names]


def process() -> int:
    return os.getpid()


def imported(module: str) -> bool:
    return module in sys.modules


def numbers() -> tuple[float, float]:
    return torch.rand(()).item(), random.random()


def state() -> tuple[bool, torch.dtype, int, str | None]:
    return torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), os.environ.get("LEFT_BEHIND")


def disturb() -> None:
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    os.environ["LEFT_BEHIND"] = "1"
    dist.destroy_process_group()


def warn() -> None:
    warnings.warn("careful", stacklevel=1)


def print_rank() -> None:
    print("said by rank", dist.get_rank())


def refuse(*ranks: int) -> None:
    if dist.get_rank() in ranks:
        raise ValueError(f"got rank {dist.get_rank()}")


def refuse_later_ranks_first(seconds: float) -> NoReturn:
    time.sleep(seconds * (dist.get_world_size() - dist.get_rank()))
    raise ValueError(f"got rank {dist.get_rank()}")


def refuse_in_words_of_its_own() -> NoReturn:
    raise TwoArguments("size", 3)


def refuse_while_others_wait(failing: int) -> None:
    if dist.get_rank() == failing:
        raise ValueError("not me")
    wait_for_the_others()


def wait_for_the_others() -> None:
    dist.all_reduce(torch.ones(1))


def wait_forever(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(1000)


def die(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    wait_for_the_others()


def leave_a_collective_behind() -> object:
    """Rank 0 alone starts it, so that its group cannot end before the others', and fails."""
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(1), async_op=True)
        raise ValueError("left it")
    return None


def unpicklable() -> object:
    return lambda: None
