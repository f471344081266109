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
from mics_kernels.ops.quantize import LIMITS, TILE, Quantized, check_block, check_scales
from mics_kernels.tables import pointer_table


@without_grad
def reference(acc: torch.Tensor, chunks: Sequence[Quantized], scale: float, block: int, *, overwrite: bool) -> None:
    """What `accumulate` does with quantized chunks, in torch."""
    check(acc, chunks, block)
    if acc.is_meta:
        return  # there is nothing to compute
    whole = acc.numel() // block * block
    most = max(SCRATCH // block, 1) * block
    for begin in range(0, whole, most):
        end = min(begin + most, whole)
        _add_blocks(acc[begin:end], chunks, scale, slice(begin, end), slice(begin // block, end // block), overwrite)
    if whole < acc.numel():  # the last block is narrower
        tail = slice(whole, acc.numel())
        _add_blocks(acc[tail], chunks, scale, tail, slice(whole // block, whole // block + 1), overwrite)


def _add_blocks(
    acc: torch.Tensor, chunks: Sequence[Quantized], scale: float, inside: slice, blocks: slice, overwrite: bool
) -> None:
    """Add blocks of one width to their part of the accumulator."""
    total = acc if overwrite and acc.dtype == torch.float32 else torch.empty_like(acc, dtype=torch.float32)
    rows = total.view(blocks.stop - blocks.start, -1)
    restored = torch.empty_like(rows) if len(chunks) > 1 else rows
    for number, (values, scales) in enumerate(chunks):
        codes = values[inside] if values.dtype == torch.int8 else values[inside].float()
        # Not addcmul_, which rounds once where kernels round twice.
        torch.mul(codes.view_as(rows), scales[blocks].unsqueeze(1), out=restored if number else rows)
        if number:
            rows.add_(restored)
    if scale != 1.0:
        total.mul_(scale)
    if not overwrite:
        total.add_(acc)
    if total is not acc:
        acc.copy_(total)


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
