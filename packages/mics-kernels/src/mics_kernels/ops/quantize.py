"""quantize / dequantize: blocks of a flat buffer as int8 or fp8, with one float32 scale each.

    scale[b]  = max(|flat[b]|) / limit                        limit: 127 for int8, 448 for e4m3, 57344 for e5m2
    values[i] = (flat[i] + residual[i]) / scale, rounded      |flat - values * scale| <= scale / 2 for int8
    residual  = flat + residual - values * scale              error feedback: what was lost is sent next time

With a base, which others have, too, `flat - base` stands in place of `flat`: differences are finer than what differs.
A buffer is read once and written once: per element (bytes of an input) + 1 + 4 / block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from mics_kernels.backend import backend, constexpr, jit, launch, tl
from mics_kernels.casting import convert
from mics_kernels.checks import FLOATS, require_flat, without_grad
from mics_kernels.eight_bits import MANTISSA_BITS, decode, encode, to_nearest_integer
from mics_kernels.flat import SCRATCH

TILE = 2048
TILE_WITH_RESIDUAL = 1024
"""Elements per program: whole blocks of them, and few enough that a thread's share fits its registers."""

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
"""The dtypes to quantize to, and the largest magnitude of each that a block's maximum becomes."""

DEQUANTIZED = 1 << 20
"""Elements that the reference dequantizes at a time, so that a cache still holds them when they are multiplied."""

SMALLEST = 2.0**-100
_SMALLEST = constexpr(SMALLEST)
"""The least maximum a block is scaled by: below it limit / maximum would overflow, and the values round to zero."""


class Quantized(NamedTuple):
    """A quantized buffer: what travels."""

    values: torch.Tensor  # int8 or fp8, as long as the buffer
    scales: torch.Tensor  # float32, one for each block; NaN where a block held an infinity or a NaN


@without_grad
def quantize_reference(
    flat: torch.Tensor,
    out: Quantized,
    block: int = 256,
    residual: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
) -> Quantized:
    """What `quantize` does, in torch."""
    if flat.is_meta:
        return out  # there is nothing to compute
    given = {name: buffer for name, buffer in (("residual", residual), ("base", base)) if buffer is not None}

    def op(width: int, scales: torch.Tensor, flat: torch.Tensor, values: torch.Tensor, *more: torch.Tensor) -> None:
        _quantize_blocks(width, scales, flat, values, **dict(zip(given, more, strict=True)))

    _by_blocks(op, SCRATCH, block, out.scales, flat, out.values, *given.values())
    return out


def _quantize_blocks(
    width: int,
    scales: torch.Tensor,
    flat: torch.Tensor,
    values: torch.Tensor,
    residual: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
) -> None:
    limit = LIMITS[values.dtype]
    x = flat.to(torch.float32)
    if base is not None:
        x = x - base
    if residual is not None:
        x = x + residual
    x = x.view(-1, width)
    largest = x.abs().amax(1)  # several times faster than a norm; NaNs propagate alike
    strange = None
    if not math.isfinite(largest.sum().item()):  # one number tells, or calls for a closer look
        strange = largest.isfinite().logical_not_()
        largest[strange] = 0
        x = x.masked_fill(strange.unsqueeze(1), 0)
    torch.div(largest.clamp_(min=SMALLEST), limit, out=scales)
    scaled = x * torch.div(limit, largest).unsqueeze(1)  # at most the limit and a rounding error, which rounds back
    values.view(-1, width).copy_(scaled if values.is_floating_point() else scaled.round_())
    if strange is not None:
        scales[strange] = torch.nan
    if residual is not None:
        lost = residual.view(-1, width)
        error = x - values.to(torch.float32).view(-1, width) * scales.unsqueeze(1)
        lost.copy_(error if strange is None else torch.where(strange.unsqueeze(1), lost, error))


@without_grad
def dequantize_reference(values: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, block: int = 256) -> None:
    """What `dequantize` does, in torch."""
    _by_blocks(_dequantize_blocks, DEQUANTIZED, block, scales, values, out)


def _dequantize_blocks(width: int, scales: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
    wide = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    wide.copy_(values).view(-1, width).mul_(scales.unsqueeze(1))
    if wide is not out:
        out.copy_(wide)


def _by_blocks(op: Callable[..., None], most: int, block: int, scales: torch.Tensor, *buffers: torch.Tensor) -> None:
    """Call `op` with the width of blocks, their scales and the buffers, at most `most` elements at a time."""
    size, rest = buffers[0].numel(), buffers[0].numel() % block
    if rest and rest < size:  # the last block is narrower
        _by_blocks(op, most, block, scales[:-1], *[buffer[:-rest] for buffer in buffers])
        _by_blocks(op, most, block, scales[-1:], *[buffer[-rest:] for buffer in buffers])
    elif size <= most:
        op(rest or block, scales, *buffers)
    else:
        for part in zip(torch.split(scales, most // block), *[torch.split(b, most) for b in buffers], strict=True):
            op(block, *part)


@jit
def _quantize_kernel(
    flat: tl.tensor,  # *D   [size]
    values: tl.tensor,  # *i8 or *u8 (the bits of fp8)  [size]
    scales: tl.tensor,  # *f32 [ceil(size / WIDTH)]
    residual: tl.tensor,  # *R   [size], or None
    base: tl.tensor,  # *B   [size], or None
    size: tl.int64,
    LIMIT: tl.constexpr,
    MANTISSA: tl.constexpr,  # bits of fp8's mantissa; 0 for int8
    WIDTH: tl.constexpr,  # elements per scale
    TILE: tl.constexpr,
) -> None:
    """One program quantizes one tile of whole blocks."""
    tile = tl.program_id(0).to(tl.int64)
    if (tile + 1) * TILE <= size:
        _quantize_tile(flat, values, scales, residual, base, tile, size, LIMIT, MANTISSA, WIDTH, TILE, False)
    else:
        _quantize_tile(flat, values, scales, residual, base, tile, size, LIMIT, MANTISSA, WIDTH, TILE, True)


@jit
def _quantize_tile(
    flat: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    residual: tl.tensor,
    base: tl.tensor,
    tile: tl.tensor,
    size: tl.tensor,
    LIMIT: tl.constexpr,
    MANTISSA: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    ROWS: tl.constexpr = TILE // WIDTH
    row = tile * ROWS + tl.arange(0, ROWS)
    index = tile * TILE + tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = index < size if MASKED else None
    x = convert(tl.load(flat + index, mask=inside, other=0) if MASKED else tl.load(flat + index), tl.float32)
    if base is not None:
        known = tl.load(base + index, mask=inside, other=0) if MASKED else tl.load(base + index)
        x -= convert(known, tl.float32)
    if residual is not None:
        kept = tl.load(residual + index, mask=inside, other=0) if MASKED else tl.load(residual + index)
        x += convert(kept, tl.float32)
    strange = tl.max((x - x != 0).to(tl.int32), 1) != 0
    largest = tl.max(tl.abs(x), 1)
    largest = tl.maximum(tl.where(strange, 0.0, largest), _SMALLEST)
    scale = tl.div_rn(largest, tl.full(largest.shape, LIMIT, tl.float32))
    inverse = tl.div_rn(tl.full(largest.shape, LIMIT, tl.float32), largest)
    y = tl.where(strange[:, None], 0.0, x) * inverse[:, None]
    if MANTISSA == 0:
        whole = to_nearest_integer(y)
        code = whole.to(tl.int8)
    else:
        code = encode(y, MANTISSA)
    tl.store(values + index, code, mask=inside)
    tl.store(scales + row, tl.where(strange, float("nan"), scale), mask=(row * WIDTH < size) if MASKED else None)
    if residual is not None:
        back = decode(code, MANTISSA)
        error = convert(x - back * scale[:, None], residual.dtype.element_ty)
        tl.store(residual + index, tl.where(strange[:, None], kept, error), mask=inside)


@jit
def _dequantize_kernel(
    values: tl.tensor,  # *i8 or *u8 (the bits of fp8)  [size]
    scales: tl.tensor,  # *f32 [ceil(size / WIDTH)]
    out: tl.tensor,  # *D   [size]
    size: tl.int64,
    MANTISSA: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program restores one tile of whole blocks."""
    tile = tl.program_id(0).to(tl.int64)
    if (tile + 1) * TILE <= size:
        _dequantize_tile(values, scales, out, tile, size, MANTISSA, WIDTH, TILE, False)
    else:
        _dequantize_tile(values, scales, out, tile, size, MANTISSA, WIDTH, TILE, True)


@jit
def _dequantize_tile(
    values: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    tile: tl.tensor,
    size: tl.tensor,
    MANTISSA: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    ROWS: tl.constexpr = TILE // WIDTH
    row = tile * ROWS + tl.arange(0, ROWS)
    index = tile * TILE + tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = index < size if MASKED else None
    code = tl.load(values + index, mask=inside)
    scale = tl.load(scales + row, mask=(row * WIDTH < size) if MASKED else None)
    back = decode(code, MANTISSA)
    tl.store(out + index, convert(back * scale[:, None], out.dtype.element_ty), mask=inside)


def _launch_quantize(
    flat: torch.Tensor, out: Quantized, block: int, residual: torch.Tensor | None, base: torch.Tensor | None
) -> Quantized:
    tile = TILE if residual is None else TILE_WITH_RESIDUAL
    launch(
        _quantize_kernel,
        -(-flat.numel() // tile),
        flat.device,
        flat,
        out.values if out.values.dtype == torch.int8 else out.values.view(torch.uint8),
        out.scales,
        residual,
        base,
        flat.numel(),
        LIMIT=LIMITS[out.values.dtype],
        MANTISSA=MANTISSA_BITS[out.values.dtype],
        WIDTH=block,
        TILE=tile,
    )
    return out


def _launch_dequantize(values: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, block: int) -> None:
    launch(
        _dequantize_kernel,
        -(-values.numel() // TILE),
        values.device,
        values if values.dtype == torch.int8 else values.view(torch.uint8),
        scales,
        out,
        values.numel(),
        MANTISSA=MANTISSA_BITS[values.dtype],
        WIDTH=block,
        TILE=TILE,
    )


def check_block(op: str, block: int) -> None:
    """Raise one sentence unless kernels can work on blocks of so many elements."""
    if not 16 <= block <= TILE_WITH_RESIDUAL or block & (block - 1):
        raise ValueError(f"{op}: block is {block}, expected a power of two from 16 to {TILE_WITH_RESIDUAL}")


def check_scales(op: str, scales: torch.Tensor, flat: torch.Tensor, block: int) -> None:
    """Raise one sentence unless there is one scale for each block of `flat`."""
    require_flat(op, "scales", scales, (torch.float32,))
    expected = -(-flat.numel() // block)
    if scales.numel() != expected or scales.device != flat.device:
        raise ValueError(
            f"{op}: scales has {scales.numel()} elements on {scales.device}, expected {expected} on {flat.device}: "
            f"one for each {block} of {flat.numel()}"
        )


def quantize(
    flat: torch.Tensor,
    dtype: torch.dtype | None = None,
    *,
    block: int = 256,
    residual: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    out: Quantized | None = None,
) -> Quantized:
    """Quantize the 1-D buffer `flat` to int8, float8_e4m3fn or float8_e5m2, with one scale for each `block` elements.

    The dtype is that of `out`, if given, else int8 unless you say.

    `residual`, a buffer as long as `flat` that starts as zeros, is added before and receives what rounding lost
    (error feedback): pass the same one again next time. `base`, as long too, is subtracted: add what comes back to it
    with `accumulate`. `out` takes the place of newly allocated results. A block
    with an infinity or a NaN gets the scale NaN, so that it comes back as NaN, and leaves its residual as it was.

    >>> values, scales = quantize(torch.tensor([0.0, 63.0, -127.0]))
    >>> values
    tensor([   0,   63, -127], dtype=torch.int8)
    """
    require_flat("quantize", "the buffer", flat, FLOATS[:3])
    check_block("quantize", block)
    if out is None:
        dtype = dtype or torch.int8
        if dtype not in LIMITS:
            raise ValueError(f"quantize: dtype is {dtype}, expected one of {', '.join(map(str, LIMITS))}")
        scales = torch.empty(-(-flat.numel() // block), dtype=torch.float32, device=flat.device)
        out = Quantized(torch.empty_like(flat, dtype=dtype), scales)
    elif dtype not in (None, out.values.dtype):
        raise ValueError(f"quantize: dtype is {dtype}, expected {out.values.dtype}, that of out.values, or none")
    require_flat("quantize", "out.values", out.values, tuple(LIMITS), like=flat)
    check_scales("quantize", out.scales, flat, block)
    for name, buffer in (("residual", residual), ("base", base)):
        if buffer is not None:
            require_flat("quantize", name, buffer, FLOATS[:3], like=flat)
    if not backend(flat.device).is_triton:
        return quantize_reference(flat, out, block, residual, base)
    return _launch_quantize(flat, out, block, residual, base)


def dequantize(
    values: torch.Tensor, scales: torch.Tensor, out: torch.Tensor | None = None, *, block: int = 256
) -> torch.Tensor:
    """Restore what `quantize` made with the same `block`, into `out` or a new float32 buffer; return it.

    >>> dequantize(*quantize(torch.tensor([0.0, 63.0, -127.0])))
    tensor([   0.,   63., -127.])
    """
    require_flat("dequantize", "values", values, tuple(LIMITS))
    check_block("dequantize", block)
    check_scales("dequantize", scales, values, block)
    if out is None:
        out = torch.empty_like(values, dtype=torch.float32)
    require_flat("dequantize", "out", out, FLOATS[:3], like=values)
    if not backend(values.device).is_triton:
        dequantize_reference(values, scales, out, block)
    else:
        _launch_dequantize(values, scales, out, block)
    return out
