"""Where the ranks of a job run: each on a GPU of its own, over NCCL, where there are as many; else they share them, or
run on the CPU.
"""

import os
from collections.abc import Mapping, Sequence
from enum import Enum


class Place(Enum):
    """What a rank computes on, and what its states travel by."""

    GPU = "{} GPUs over NCCL"
    SHARED = "{} GPUs that ranks share"
    CPU = "CPU ranks"

    def called(self, gpus: int) -> str:
        """For people."""
        return self.value.format(gpus)


def visible(count: int, environment: Mapping[str, str] = os.environ) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that this process sees so many of."""
    names = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return names[:count] if names != [""] else [str(number) for number in range(count)]


def place(world: int, gpus: Sequence[str], *, sharing: bool = True) -> Place:
    """Where a job of so many ranks runs; sharing: whether ranks may share GPUs."""
    if world <= len(gpus):
        return Place.GPU
    return Place.SHARED if gpus and sharing else Place.CPU


def gpus_of(world: int, gpus: Sequence[str], at: Place) -> list[str]:
    """The GPU that each rank sees; none if it is a CPU rank. Where ranks share GPUs, none has one of its own."""
    if at is Place.CPU:
        return [""] * world
    used = gpus if at is Place.GPU else gpus[: world // 2]
    return [used[rank % len(used)] for rank in range(world)]
