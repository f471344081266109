"""The registry of kernel cases. `python -m bench.kernels`, pytest-benchmark and `make gpu-check` all run these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.adamw_work import adamw_work
from bench.flat_work import accumulate_work, adding_pack_work, moving_pack_work, pack_work, square_sum_work, unpack_work
from bench.layouts import Layout, block_sizes, small_sizes
from bench.quantize_work import accumulate_quantized_work, dequantize_work, difference_work, quantize_work
from bench.work import BF16, FP32, INT8, Work

KB, MB = 1 << 10, 1 << 20

SIZES = {
    "cpu": (64 * MB, 4 * KB, MB, 16 * MB, 64 * KB),
    "cuda": (64 * MB, 256 * MB, 4 * KB, MB, 16 * MB, 64 * KB),
}
"""Bytes of the flat buffer, the most telling first: what is dropped when time runs out is dropped from the end."""

QUICK = (4 * KB, MB)


@dataclass(frozen=True)
class Line:
    """An op in one scene, at several sizes."""

    op: str
    scene: str
    itemsize: int  # bytes per element of the flat buffer
    build: Callable[[int, torch.device], Work]  # from its elements
    sizes: Sequence[int] = ()  # empty: all
    roofline: bool = True  # whether the goals for the share of a copy's bandwidth hold


def _block(elements: int) -> Layout:
    return Layout(block_sizes(elements))


_SMALL = Layout(small_sizes(2000))

LINES = (
    Line("pack", "bf16 to fp32", 4, lambda n, on: pack_work(_block(n), FP32, on)),
    Line("pack", "bf16 to bf16", 2, lambda n, on: pack_work(_block(n), BF16, on)),
    Line("pack", "bf16 to fp32, scaled", 4, lambda n, on: pack_work(_block(n), FP32, on, scale=0.3), (64 * MB, 4 * KB)),
    Line("pack", "new addresses", 4, moving_pack_work, (16 * MB, 4 * KB)),
    Line("pack", "2000 small tensors", 4, lambda _, on: pack_work(_SMALL, FP32, on), (4 * _SMALL.length,)),
    Line("pack", "misaligned views", 2, lambda n, on: pack_work(_block(n), BF16, on, shift=1), (64 * MB,), False),
    Line("pack", "bf16 added to fp32", 4, lambda n, on: adding_pack_work(_block(n), on)),
    Line("unpack", "bf16 to bf16", 2, lambda n, on: unpack_work(_block(n), on)),
    Line("unpack", "2000 small tensors", 2, lambda _, on: unpack_work(_SMALL, on), (2 * _SMALL.length,)),
    Line("unpack", "misaligned views", 2, lambda n, on: unpack_work(_block(n), on, shift=1), (64 * MB,), False),
    Line("accumulate", "4 chunks", 4, lambda n, on: accumulate_work(n, on, count=4)),
    Line("accumulate", "1 chunk", 4, lambda n, on: accumulate_work(n, on, count=1)),
    Line("accumulate", "overwrite", 4, lambda n, on: accumulate_work(n, on, count=4, overwrite=True), (64 * MB,)),
    Line("accumulate", "misaligned", 4, lambda n, on: accumulate_work(n, on, count=4, shift=1), (64 * MB,), False),
    Line("accumulate", "4 chunks of int8", 4, lambda n, on: accumulate_quantized_work(n, on, count=4)),
    Line("square_sum", "fp32", 4, lambda n, on: square_sum_work(n, FP32, on)),
    Line("square_sum", "bf16", 2, lambda n, on: square_sum_work(n, BF16, on), (64 * MB,)),
    Line("adamw", "flat", 4, lambda n, on: adamw_work(Layout([n]), on)),
    Line("adamw", "per tensor", 4, lambda n, on: adamw_work(_block(n), on), (64 * MB, 4 * KB)),
    Line("quantize", "bf16 to int8", 2, lambda n, on: quantize_work(n, INT8, on)),
    Line("quantize", "bf16 to fp8", 2, lambda n, on: quantize_work(n, torch.float8_e4m3fn, on), (64 * MB,)),
    Line("quantize", "error feedback", 2, lambda n, on: quantize_work(n, INT8, on, feedback=True), (64 * MB,)),
    Line("quantize", "fp32 - bf16 to int8", 4, difference_work),
    Line("dequantize", "int8 to fp32", 4, dequantize_work),
)

OPS = tuple(dict.fromkeys(line.op for line in LINES))


@dataclass(frozen=True)
class Case:
    """A line at one size."""

    line: Line
    size: int  # bytes of the flat buffer

    @property
    def name(self) -> str:
        """What tables and tests call it."""
        return f"{self.line.op} {self.line.scene} {size_text(self.size)}"

    def build(self, device: torch.device) -> Work:
        """Fresh buffers, with the same random numbers each time."""
        torch.manual_seed(0)
        return self.line.build(self.size // self.line.itemsize, device)


def size_text(size: int) -> str:
    """Bytes as people write them."""
    unit, name = (MB, "MB") if size >= MB else (KB, "KB")
    return f"{size / unit:.3g} {name}"


def cases(device: torch.device, ops: Sequence[str] = OPS, *, quick: bool = False) -> list[Case]:
    """What to measure on `device`, the most telling first; `quick` leaves out what is large."""
    sizes = QUICK if quick else SIZES[device.type]
    lines = [line for line in LINES if line.op in ops]
    ranked = [(rank, line, size) for line in lines for rank, size in enumerate(line.sizes or sizes)]
    return [Case(line, size) for _, line, size in sorted(ranked, key=lambda row: row[0]) if not quick or size < 16 * MB]
