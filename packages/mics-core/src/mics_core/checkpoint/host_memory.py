"""Host memory for what a background save writes: taken by the first one, used again by those that follow.

Fresh memory costs as long again as the copy into it, and a GPU copies to pinned memory several times as fast, which is
too slow to take anew for every save.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from weakref import WeakKeyDictionary

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
        memory = torch.empty(begins[-1], dtype=torch.uint8, pin_memory=runtime.world.device.type == "cuda")
        _held[runtime] = memory
    found = []
    for part, begin in zip(parts, begins[:-1], strict=True):
        place = memory[begin : begin + part.nbytes].view(part.dtype).view(part.shape)
        found.append(place.copy_(part.detach(), non_blocking=True))
    if runtime.world.device.type == "cuda":
        torch.cuda.current_stream(runtime.world.device).synchronize()
    return found
