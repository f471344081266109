"""Host memory for what a background save writes: taken by the first one, used again by those that follow.

Fresh memory costs as long again as the copy into it, and a GPU copies to pinned memory several times as fast, which is
too slow to take anew for every save.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from mmap import mmap
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch

from mics_core.registry import Runtime

_ALIGNED = 64
_held: WeakKeyDictionary[Runtime, torch.Tensor] = WeakKeyDictionary()


def copies(runtime: Runtime, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of these in host memory, which last until the next call for this runtime."""
    sizes = [-(-part.nbytes // _ALIGNED) * _ALIGNED for part in parts]
    begins = list(accumulate(sizes, initial=0))
    memory = _held.get(runtime)
    if memory is None or memory.numel() < begins[-1]:
        _held.pop(runtime, None)  # before the larger one is taken
        pinned = runtime.world.device.type == "cuda" and begins[-1]
        memory = _pinned(begins[-1]) if pinned else torch.empty(begins[-1], dtype=torch.uint8, device="cpu")
        _held[runtime] = memory
    found = []
    for part, begin in zip(parts, begins[:-1], strict=True):
        place = memory[begin : begin + part.nbytes].view(part.dtype).view(part.shape)
        found.append(place.copy_(part.detach(), non_blocking=True))
    if runtime.world.device.type == "cuda":
        torch.cuda.current_stream(runtime.world.device).synchronize()
    return found


def _pinned(size: int) -> torch.Tensor:
    """So many bytes on pages of their own, to which a GPU copies directly. torch's pinned memory is a power of two."""
    memory = torch.frombuffer(mmap(-1, size), dtype=torch.uint8)
    cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(cuda.cudaHostRegister(memory.data_ptr(), size, 1))  # 1: for all devices of this process
    finalize(memory, cuda.cudaHostUnregister, memory.data_ptr()).atexit = False  # CUDA is gone by then
    return memory
