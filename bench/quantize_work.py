"""quantize's and dequantize's work, beside the sequences of torch operations that do the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from bench.layouts import normal, poison
from bench.work import BF16, FP32, INT8, Candidate, Tensors, Work
from mics_kernels import accumulate, dequantize, quantize
from mics_kernels.ops.quantize import LIMITS, Quantized

BLOCK = 256
"""Elements that share a scale."""


def quantize_work(elements: int, to: torch.dtype, device: torch.device, *, feedback: bool = False) -> Work:
    flat, limit, restored = normal(elements, BF16, device), LIMITS[to], poison(elements, FP32, device)
    rows = flat.view(-1, BLOCK)
    start = 0.01 * normal(elements, FP32, device) if feedback else None

    def candidate(call: Callable[[torch.Tensor | None], Quantized]) -> Candidate:
        residual = None if start is None else start.clone()

        def results(out: Quantized) -> Tensors:
            # What error feedback must give back is the sum of the two: either rounding of a tie is right.
            back = dequantize(*out, restored, block=BLOCK)
            return [*out] if residual is None else [*out, back + residual]

        return Candidate(partial(call, residual), results=results)

    def with_rest(residual: torch.Tensor | None) -> torch.Tensor:
        return rows if residual is None else rows + residual.view(-1, BLOCK)

    def finish(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, residual: torch.Tensor | None) -> Quantized:
        values = (y.round_() if to == INT8 else y).clamp_(-limit, limit).to(to)
        if residual is not None:
            torch.sub(x, values.to(FP32).mul_(scale), out=residual.view(-1, BLOCK))
        return Quantized(values.view(-1), scale.view(-1))

    def by_dividing(residual: torch.Tensor | None) -> Quantized:
        x = with_rest(residual)
        scale = x.abs().amax(1, keepdim=True).to(FP32).clamp_(min=2.0**-100).div_(limit)
        return finish(x, x / scale, scale, residual)

    def by_multiplying(residual: torch.Tensor | None) -> Quantized:
        x = with_rest(residual)
        largest = torch.linalg.vector_norm(x, math.inf, 1, keepdim=True).to(FP32).clamp_(min=2.0**-100)
        return finish(x, x * (limit / largest), largest / limit, residual)

    out = Quantized(torch.empty(elements, dtype=to, device=device), poison(elements // BLOCK, FP32, device))
    residual_bytes = 2 * FP32.itemsize if feedback else 0
    return Work(
        bytes=elements * (BF16.itemsize + 1 + residual_bytes) + elements // BLOCK * FP32.itemsize,
        ours=candidate(lambda residual: quantize(flat, block=BLOCK, residual=residual, out=out)),
        idioms={"abs, amax, div": candidate(by_dividing), "vector_norm, mul": candidate(by_multiplying)},
        tolerance=1e-5,
    )


def difference_work(elements: int, device: torch.device) -> Work:
    """What a refresh sends: by how much float32 masters differ from the bfloat16 weights that everybody has."""
    base = normal(elements, BF16, device)
    flat = base.to(FP32) + 1e-3 * normal(elements, FP32, device)

    def by_multiplying() -> Quantized:
        x = (flat - base).view(-1, BLOCK)
        largest = torch.linalg.vector_norm(x, math.inf, 1, keepdim=True).clamp_(min=2.0**-100)
        return Quantized((x * (127 / largest)).round_().clamp_(-127, 127).to(INT8).view(-1), (largest / 127).view(-1))

    def by_dividing() -> Quantized:
        x = (flat - base).view(-1, BLOCK)
        scale = x.abs().amax(1, keepdim=True).clamp_(min=2.0**-100).div_(127)
        return Quantized((x / scale).round_().clamp_(-127, 127).to(INT8).view(-1), scale.view(-1))

    out = Quantized(torch.empty(elements, dtype=INT8, device=device), poison(elements // BLOCK, FP32, device))
    return Work(
        bytes=elements * (FP32.itemsize + BF16.itemsize + 1) + elements // BLOCK * FP32.itemsize,
        ours=Candidate(lambda: quantize(flat, block=BLOCK, base=base, out=out), results=list),
        idioms={
            "abs, amax, div": Candidate(by_dividing, results=list),
            "vector_norm, mul": Candidate(by_multiplying, results=list),
        },
        tolerance=1e-5,
    )


def dequantize_work(elements: int, device: torch.device) -> Work:
    values = torch.randint(-127, 128, (elements,), dtype=INT8, device=device)
    scales = normal(elements // BLOCK, FP32, device).abs_()
    ours, multiplied, copied = (poison(elements, FP32, device) for _ in range(3))

    def by_mul() -> Tensors:
        torch.mul(values.view(-1, BLOCK), scales.view(-1, 1), out=multiplied.view(-1, BLOCK))
        return [multiplied]

    def by_copy() -> Tensors:
        copied.copy_(values).view(-1, BLOCK).mul_(scales.view(-1, 1))
        return [copied]

    return Work(
        bytes=elements * (1 + FP32.itemsize) + elements // BLOCK * FP32.itemsize,
        ours=Candidate(partial(dequantize, values, scales, ours, block=BLOCK), results=lambda _: [ours]),
        idioms={"mul": Candidate(by_mul), "copy_, mul_": Candidate(by_copy)},
    )


def accumulate_quantized_work(elements: int, device: torch.device, *, count: int) -> Work:
    """What arrives on a slow level: restored and added in one pass."""
    chunks = [quantize(normal(elements, BF16, device), block=BLOCK) for _ in range(count)]
    ours, summed, restored = (poison(elements, FP32, device) for _ in range(3))

    def by_restoring() -> Tensors:
        dequantize(*chunks[0], summed, block=BLOCK)
        for chunk in chunks[1:]:
            summed.add_(dequantize(*chunk, restored, block=BLOCK))
        return [summed]

    def by_mul() -> Tensors:
        rows = summed.view(-1, BLOCK)
        torch.mul(chunks[0].values.view(-1, BLOCK), chunks[0].scales.view(-1, 1), out=rows)
        for values, scales in chunks[1:]:
            rows.addcmul_(values.view(-1, BLOCK), scales.view(-1, 1))
        return [summed]

    return Work(
        bytes=elements * (count + FP32.itemsize) + count * (elements // BLOCK) * FP32.itemsize,
        ours=Candidate(partial(accumulate, ours, chunks, overwrite=True), results=lambda _: [ours]),
        idioms={"dequantize, add_": Candidate(by_restoring), "mul, addcmul_": Candidate(by_mul)},
        tolerance=1e-5,
    )
