"""The machine that a process runs on, as a cluster's file would tell it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from mics_core.comm.placement import rank_memory

THIS = "this machine"

USABLE = 0.9
"""The share of a rank's memory that a cluster counts: torch, NCCL and what an allocator loses take the rest."""


def this_machine() -> dict[str, Any]:
    """What this process runs on, as one node: memory and speed are looked up or measured, links are guessed.

    On a machine without GPUs the ranks share its cores and memory. Takes a fraction of a second.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cores = os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", gpus or cores))
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    share = 1.0 if gpus else min(1.0, cores / ranks)  # what is measured is one core, or one GPU
    if gpus:
        names, transport = ["bfloat16", "float16", "float32"], "nccl"
        intra, inter = (50e9, 10e-6), (10e9, 30e-6)
    else:
        names, transport = ["bfloat16", "float32"], "gloo"
        intra, inter = (0.5e9 * share, 0.5e-3), (0.1e9, 1e-3)
    guess = "a guess: `mics probe` under torchrun measures links"
    return {
        "name": THIS,
        "nodes": 1,
        "ranks_per_node": ranks,
        "memory": int(USABLE * rank_memory(device, 1 if gpus else ranks)),
        "flops": {name: share * _product_rate(device, getattr(torch, name)) for name in names},
        "memory_bandwidth": share * _copy_rate(device),
        "intra": dict(zip(("bandwidth", "latency"), intra, strict=True)),
        "inter": dict(zip(("bandwidth", "latency"), inter, strict=True)),
        "efficiency": 0.8,
        "sources": {
            "memory": "looked up, of which a tenth is left to others",
            "flops": "one matrix product, measured",
            "memory_bandwidth": "one copy, measured",
            "intra": guess,
            "inter": guess,
            "efficiency": "a guess: a step has smaller products than the measured one",
        },
        "transport": transport,
    }


def _fastest(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of the shortest of a few runs."""
    times = []
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = 4096 if device.type == "cuda" else 256
    matrix = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / _fastest(device, lambda: matrix @ matrix)


def _copy_rate(device: torch.device) -> float:
    source = torch.zeros(2**26 if device.type == "cuda" else 2**22, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _fastest(device, lambda: target.copy_(source))
