"""What a device can compute at most, which a model's FLOPs are set against."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

PUBLISHED = {
    "NVIDIA A100": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H200": 989.0,
    "NVIDIA H200 NVL": 835.0,
    "NVIDIA B200": 2250.0,
}
"""Dense bfloat16 TFLOP/s by the begin of the GPU's name, from NVIDIA's data sheets; the longest that fits counts."""

SIZE = 512  # of the matrices that are multiplied where nothing is published
SECONDS = 0.5  # in which the fastest product counts: on a shared machine most are slowed down


@dataclass(frozen=True)
class Peak:
    """So many FLOP/s, and where the number is from."""

    flops: float
    source: str


def peak(device: torch.device, dtype: torch.dtype, told_tflops: float) -> Peak:
    """The peak of one device: as the settings tell, else as published, else as measured with a product of matrices."""
    if told_tflops:
        return Peak(told_tflops * 1e12, "log.peak_tflops")
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        fitting = [known for known in PUBLISHED if name.startswith(known)]
        if fitting:
            best = max(fitting, key=len)
            return Peak(PUBLISHED[best] * 1e12, f"published for {best}")
    return Peak(_measure(device, dtype), "a measured matrix product")


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    size = SIZE if device.type == "cpu" else 16 * SIZE
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        begun = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # wait for it
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best
