"""Clusters known by name. Each number says where it is from; where nobody measured it, that it is a guess."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from difflib import get_close_matches

import torch

from mics_core.comm.world import rank_memory
from mics_core.errors import ConfigError
from mics_core.planner.cluster import USABLE, Cluster, Link, Transport

THIS = "this machine"
GIB = 2**30
_A100 = {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12}
_H100 = {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12}
_MEMORY = "data sheet, of which a tenth is left to CUDA, NCCL and fragmentation"
_SHEET = "data sheet"
_FABRIC = "85 % of the data sheet's rate, the share that IDEFICS-80B's authors measured on p4d (340 of 400 Gbit/s)"
_EFA = "aws-ofi-nccl's tuner gives 20 us for a message on p5; taken for all EFA"
_NVLINK = "NCCL's tuning.cc, a hop of a ring over NVLink, protocol Simple"
_FIT = "the one fitted number: MiCS 100B on 512 A100, 170 TFLOP/s a GPU"


def find(name: str) -> Cluster:
    """One node of this kind."""
    if name == THIS:
        return this_machine()
    known = [*_KNOWN, THIS]
    if name not in known:
        close = get_close_matches(str(name), known, 1, 0.5)
        meant = f", perhaps {close[0]!r}" if close else ""
        raise ConfigError(
            f"cluster: there is no preset {name!r}, only {', '.join(known)}{meant}: take one of them, or a file that "
            "`mics probe cluster.toml` wrote"
        )
    return _KNOWN[name]()


def listed() -> list[Cluster]:
    """One node of each kind that needs no look at this machine."""
    return [make() for make in _KNOWN.values()]


def _p3dn() -> Cluster:
    return Cluster(
        name="p3dn.24xlarge",
        nodes=1,
        ranks_per_node=8,
        memory=int(USABLE * 32 * GIB),
        flops={"float16": 125e12, "float32": 15.7e12},
        memory_bandwidth=0.9 * 900e9,
        intra=Link(128e9, 3.4e-6),
        inter=Link(11e9, 20e-6),
        efficiency=0.55,
        sources={
            "memory": _MEMORY,
            "flops": "V100 data sheet; it has no bfloat16",
            "memory_bandwidth": "90 % of the V100 data sheet's 900 GB/s",
            "intra.bandwidth": "all-gather inside a node, as the MiCS paper's figure is remembered",
            "intra.latency": _NVLINK,
            "inter.bandwidth": "all-gather over 64 GPUs on 100 Gbit/s, as the MiCS paper's figure is remembered",
            "inter.latency": _EFA,
            "efficiency": "a guess: as fitted on A100",
        },
    )


def _p4(name: str, memory: int, memory_bandwidth: float) -> Cluster:
    return Cluster(
        name=name,
        nodes=1,
        ranks_per_node=8,
        memory=int(USABLE * memory),
        flops=_A100,
        memory_bandwidth=0.9 * memory_bandwidth,
        intra=Link(235e9, 3.4e-6),
        inter=Link(0.85 * 50e9, 20e-6),
        efficiency=0.548,
        sources={
            "memory": _MEMORY,
            "flops": "A100 data sheet, dense",
            "memory_bandwidth": f"90 % of the A100 data sheet's {memory_bandwidth / 1e9:.0f} GB/s",
            "intra.bandwidth": "bus bandwidth of nccl-tests inside a node of 8 A100, of 300 GB/s each way",
            "intra.latency": _NVLINK,
            "inter.bandwidth": _FABRIC,
            "inter.latency": _EFA,
            "efficiency": _FIT,
        },
    )


def _h100(name: str, latency: float, source: str) -> Cluster:
    return Cluster(
        name=name,
        nodes=1,
        ranks_per_node=8,
        memory=int(USABLE * 80 * GIB),
        flops=_H100,
        memory_bandwidth=0.9 * 3350e9,
        intra=Link(361e9, 3.4e-6),
        inter=Link(0.85 * 400e9, latency),
        efficiency=0.5,
        sources={
            "memory": _MEMORY,
            "flops": "H100 SXM data sheet, dense",
            "memory_bandwidth": "90 % of the H100 SXM data sheet's 3350 GB/s",
            "intra.bandwidth": "all-gather of 16 GiB in a node of 8 H200, which have the same NVLink; of 450 GB/s",
            "intra.latency": _NVLINK,
            "inter.bandwidth": "a guess: " + _FABRIC,
            "inter.latency": source,
            "efficiency": "a guess: Megatron-LM and llm-foundry report 41 to 48 % with all that they send",
        },
    )


_KNOWN: dict[str, Callable[[], Cluster]] = {
    "p3dn.24xlarge": _p3dn,
    "p4d.24xlarge": lambda: _p4("p4d.24xlarge", 40 * GIB, 1555e9),
    "p4de.24xlarge": lambda: _p4("p4de.24xlarge", 80 * GIB, 2039e9),
    "p5.48xlarge": lambda: _h100("p5.48xlarge", 20e-6, _EFA),
    "DGX-H100": lambda: _h100("DGX-H100", 14e-6, "NCCL's tuning.cc, a hop of a ring between nodes, protocol Simple"),
}


def this_machine() -> Cluster:
    """What this process runs on, as one node: memory and speed are looked up or measured, links are guessed.

    On a machine without GPUs the ranks share its cores and memory. Takes a fraction of a second.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cores = os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", gpus or cores))
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    share = 1.0 if gpus else min(1.0, cores / ranks)  # what is measured is one core, or one GPU
    if gpus:
        names, transport = ["bfloat16", "float16", "float32"], Transport.NCCL
        intra, inter = Link(50e9, 10e-6), Link(10e9, 30e-6)
    else:
        names, transport = ["bfloat16", "float32"], Transport.GLOO
        intra, inter = Link(0.5e9 * share, 0.5e-3), Link(0.1e9, 1e-3)
    guess = "a guess: `mics probe` under torchrun measures links"
    return Cluster(
        name=THIS,
        nodes=1,
        ranks_per_node=ranks,
        memory=int(USABLE * rank_memory(device, ranks)),
        flops={name: share * _product_rate(device, getattr(torch, name)) for name in names},
        memory_bandwidth=share * _copy_rate(device),
        intra=intra,
        inter=inter,
        efficiency=0.8,
        sources={
            "memory": "looked up, of which a tenth is left to others",
            "flops": "one matrix product, measured",
            "memory_bandwidth": "one copy, measured",
            "intra": guess,
            "inter": guess,
            "efficiency": "a guess: a step has smaller products than the measured one",
        },
        transport=transport,
    )


def _best(device: torch.device, work: Callable[[], object]) -> float:
    """The shortest of a few runs."""
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
    return 2 * size**3 / _best(device, lambda: matrix @ matrix)


def _copy_rate(device: torch.device) -> float:
    source = torch.zeros(2**26 if device.type == "cuda" else 2**22, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _best(device, lambda: target.copy_(source))
