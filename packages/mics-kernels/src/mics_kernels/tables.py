"""Small device tensors that launches need again and again: made once, and kept while they serve."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

T = TypeVar("T")

KEPT = 4096
"""Entries kept before the least recently used one goes: a model has a few hundred units, each with a few."""

_LOCK = threading.RLock()  # autograd runs a thread for each device
_CONSTANTS: OrderedDict[tuple[torch.device, Hashable], Any] = OrderedDict()
_SCRATCH: OrderedDict[tuple[torch.device, int, Hashable], torch.Tensor] = OrderedDict()
_CAPTURED: dict[int, Any] = {}
"""What the replays of some CUDA graph may read, by its id. Nothing tells when a graph is gone: it stays for good."""


def constant(device: torch.device, key: Hashable, build: Callable[[], T]) -> T:
    """What `build` returned for `key`, which must determine it: memory that launches read and never write."""
    capturing = _capturing(device)
    with _LOCK:
        found: T | None = _CONSTANTS.get((device, key))
        if found is None:
            if capturing:
                raise RuntimeError(
                    "mics_kernels: a CUDA graph is being captured and this op meets these sizes for the first time, "
                    "expected their tables on the device already: call it once before the capture"
                )
            found = _CONSTANTS[device, key] = build()
            if len(_CONSTANTS) > KEPT:
                (owner, _), _ = _CONSTANTS.popitem(last=False)
                if owner.type == "cuda":
                    torch.cuda.synchronize(owner)  # a launch on any stream may still read what goes
        elif len(_CONSTANTS) > KEPT // 2:  # before that nothing is about to go, and hashing a long key again costs
            _CONSTANTS.move_to_end((device, key))
        if capturing:
            _CAPTURED[id(found)] = found
    return found


def scratch(device: torch.device, key: Hashable, build: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `build` returned for `key` on the current stream: memory that launches write.

    One per stream: two launches never share it, and the allocator may reuse a dropped one in stream order.
    """
    if _capturing(device):
        return build()  # the graph's replays fill this memory, and it comes from their pool: nobody may share it
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    place = (device, stream, key)
    with _LOCK:
        found = _SCRATCH.get(place)
        if found is None:
            found = _SCRATCH[place] = build()
            if len(_SCRATCH) > KEPT:
                _SCRATCH.popitem(last=False)
        else:
            _SCRATCH.move_to_end(place)
    return found


def pointer_table(pointers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """An int64 tensor on `device` that holds `pointers`; the same one for as long as the same pointers come.

    New numbers travel as kernel arguments, by value, in launches of their own: there is no pinned buffer to guard and
    no host sync, and a CUDA graph records them.
    """

    def build() -> torch.Tensor:
        table = torch.zeros(len(pointers), dtype=torch.int64, device=device)
        if pointers:
            torch._foreach_add_(list(table.unbind()), list(pointers))
        return table

    if _capturing(device):
        # Nobody writes to a table but its builder, so one that is there may serve a graph, if it stays.
        with _LOCK:
            for (owner, _, key), table in _SCRATCH.items():
                if owner == device and key == pointers:
                    _CAPTURED[id(table)] = table
                    return table
    return scratch(device, pointers, build)


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
