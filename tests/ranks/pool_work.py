"""What test_pool.py asks ranks to do."""

import os
import random
import time
import warnings

import torch
import torch.distributed as dist


def reduce_ranks() -> tuple[int, int, float]:
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item()


def environment(*names: str) -> list[str | None]:
    return [os.environ.get(name) for name in names]


def default_device() -> str:
    return str(torch.get_default_device())


def process() -> int:
    return os.getpid()


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


def refuse(*ranks: int) -> None:
    if dist.get_rank() in ranks:
        raise ValueError(f"got rank {dist.get_rank()}")


def wait_for_the_others() -> None:
    dist.all_reduce(torch.ones(1))


def wait_forever(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(1000)


def die(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    wait_for_the_others()
