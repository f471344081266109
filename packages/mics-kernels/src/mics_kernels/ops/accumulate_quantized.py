"""accumulate of quantized chunks: acc += scale * sum of (values * scales), or =.

What `accumulate` does with what `quantize` made: each chunk is restored and added in its order, in float32, and never
written in between: n * (1 + 4 / block) bytes read for each element, and the accumulator's written (and read).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mics_kernels.backend import jit, launch, tl
from mics_kernels.casting import convert
from mics_kernels.checks import FLOATS, require_flat, without_grad
from mics_kernels.eight_bits import MANTISSA_BITS, decode
from mics_kernels.flat import SCRATCH
from mics_kernels.ops.quantize import LIMITS, TILE, Quantized, check_block, check_scales, dequantize_reference
from mics_kernels.tables import pointer_table


@without_grad
def reference(acc: torch.Tensor, chunks: Sequence[Quantized], scale: float, block: int, *, overwrite: bool) -> None:
    """What `accumulate` does with quantized chunks, in torch."""
    check(acc, chunks, block)
    if acc.is_meta:
        return  # there is nothing to compute
    most = max(SCRATCH // block, 1) * block
    first, further = (torch.empty(min(most, acc.numel()), device=acc.device) for _ in range(2))
    for begin in range(0, acc.numel(), most):
        piece = acc[begin : begin + most]
        blocks = slice(begin // block, -(-(begin + piece.numel()) // block))
        total, restored = first[: piece.numel()], further[: piece.numel()]
        for number, (values, scales) in enumerate(chunks):
            target = restored if number else total
            dequantize_reference(values[begin : begin + most], scales[blocks], target, block)
            if number:
                total.add_(restored)
        total.mul_(scale)
        piece.copy_(total if overwrite else total.add_(piece))


@jit
def _accumulate_quantized_kernel(
    acc: tl.tensor,  # *A   [size]
    pointers: tl.tensor,  # *i64 [2 * chunks]  addresses of the values, [size] each, then of the scales
    chunks: tl.int32,
    size: tl.int64,
    scale: tl.float64,
    MANTISSA: tl.constexpr,  # bits of fp8's mantissa; 0 for int8
    ALIGNED: tl.constexpr,  # acc and the values of every chunk begin at multiples of 16 bytes
    OVERWRITE: tl.constexpr,
    WIDTH: tl.constexpr,  # elements per scale
    TILE: tl.constexpr,
) -> None:
    """One program adds one tile of whole blocks of every chunk."""
    tile = tl.program_id(0).to(tl.int64)
    if (tile + 1) * TILE <= size:
        _add_tile(acc, pointers, chunks, tile, size, scale, MANTISSA, ALIGNED, OVERWRITE, WIDTH, TILE, False)
    else:
        _add_tile(acc, pointers, chunks, tile, size, scale, MANTISSA, ALIGNED, OVERWRITE, WIDTH, TILE, True)


@jit
def _add_tile(
    acc: tl.tensor,
    pointers: tl.tensor,
    chunks: tl.tensor,
    tile: tl.tensor,
    size: tl.tensor,
    scale: tl.tensor,
    MANTISSA: tl.constexpr,
    ALIGNED: tl.constexpr,
    OVERWRITE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    ROWS: tl.constexpr = TILE // WIDTH
    row = tile * ROWS + tl.arange(0, ROWS)
    index = tile * TILE + tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = index < size if MASKED else None
    rows = row * WIDTH < size if MASKED else None
    # The first one is not added to zeros: 0 + -0 would lose the sign.
    total = _restored(pointers, chunks, 0, index, row, inside, rows, MANTISSA, ALIGNED)
    for chunk in range(1, chunks):
        total += _restored(pointers, chunks, chunk, index, row, inside, rows, MANTISSA, ALIGNED)
    total *= tl.full(index.shape, scale, tl.float32)
    if not OVERWRITE:
        total += convert(tl.load(acc + index, mask=inside), tl.float32)
    tl.store(acc + index, convert(total, acc.dtype.element_ty), mask=inside)


@jit
def _restored(
    pointers: tl.tensor,
    chunks: tl.tensor,
    chunk: tl.tensor,
    index: tl.tensor,
    row: tl.tensor,
    inside: tl.tensor,
    rows: tl.tensor,
    MANTISSA: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    CODE: tl.constexpr = tl.int8 if MANTISSA == 0 else tl.uint8
    values = tl.load(pointers + chunk).to(tl.pointer_type(CODE))
    if ALIGNED:
        values = tl.multiple_of(values, 16)
    scales = tl.load(tl.load(pointers + chunks + chunk).to(tl.pointer_type(tl.float32)) + row, mask=rows)
    return decode(tl.load(values + index, mask=inside), MANTISSA) * scales[:, None]


def launch_quantized(
    acc: torch.Tensor, chunks: Sequence[Quantized], scale: float, block: int, *, overwrite: bool
) -> None:
    """What `accumulate` does with quantized chunks, in one kernel."""
    check(acc, chunks, block)
    values, scales = (tuple([part.data_ptr() for part in parts]) for parts in zip(*chunks, strict=True))
    kind = chunks[0].values.dtype
    tile = TILE if kind == torch.int8 else TILE // 2  # the integers that fp8 takes fill registers
    launch(
        _accumulate_quantized_kernel,
        -(-acc.numel() // tile),
        acc.device,
        acc,
        pointer_table(values + scales, acc.device),
        len(chunks),
        acc.numel(),
        scale,
        MANTISSA=MANTISSA_BITS[kind],
        ALIGNED=all(pointer % 16 == 0 for pointer in (acc.data_ptr(), *values)),
        OVERWRITE=overwrite,
        WIDTH=block,
        TILE=tile,
    )


def check(acc: torch.Tensor, chunks: Sequence[Quantized], block: int) -> None:
    """Raise one sentence unless the chunks are of one dtype, and as long as `acc`."""
    require_flat("accumulate", "acc", acc, FLOATS[:3])
    check_block("accumulate", block)
    for number, (values, scales) in enumerate(chunks):
        kinds = (chunks[0].values.dtype,) if number else tuple(LIMITS)
        require_flat("accumulate", f"chunk {number}", values, kinds, like=acc)
        check_scales("accumulate", scales, values, block)
