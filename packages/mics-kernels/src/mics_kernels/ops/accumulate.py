"""accumulate: acc += scale * (chunk_0 + chunk_1 + ... + chunk_{n-1}), or = in the first micro-step.

The chunks are what the ranks of a group sent, in the dtype of the wire; they are added in their order, in float32,
so the sum has the same bits on every run. Each chunk is read once: n * (bytes of an input) + 4 written (+ 4 read).
Quantized chunks are restored as they are read (accumulate_quantized.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from mics_kernels.backend import backend, constexpr, jit, launch, tl
from mics_kernels.casting import convert
from mics_kernels.checks import require_flat, without_grad
from mics_kernels.flat import SCRATCH, copy_scaled
from mics_kernels.ops import accumulate_quantized
from mics_kernels.ops.quantize import Quantized
from mics_kernels.tables import pointer_table

TILE = 2048
SMALL_TILE = 512
_SMALL_TILE = constexpr(SMALL_TILE)
"""Elements per program: acc, sum and the chunk in flight hold 3 * 16 registers of a thread. The small one is for
float64, for the end of a buffer, and for addresses that are not multiples of 16 bytes, where every element takes an
access of its own."""


@without_grad
def reference(
    acc: torch.Tensor,
    chunks: torch.Tensor | Sequence[torch.Tensor],
    scale: float = 1.0,
    *,
    overwrite: bool = False,
) -> None:
    """What `accumulate` does, in torch."""
    parts = _check(acc, chunks)
    if acc.is_meta:
        return  # there is nothing to compute
    if len(parts) == 1 and overwrite:
        copy_scaled(parts[0], acc, scale)
    elif acc.numel() <= SCRATCH or (len(parts) == 1 and parts[0].dtype == acc.dtype):
        _accumulate_part(acc, parts, scale, overwrite)
    else:
        # torch converts an addend as a whole, into new memory: of a part a cache holds that, too.
        for piece, *pieces in zip(*[torch.split(buffer, SCRATCH) for buffer in (acc, *parts)], strict=True):
            _accumulate_part(piece, pieces, scale, overwrite)


def _accumulate_part(acc: torch.Tensor, parts: Sequence[torch.Tensor], scale: float, overwrite: bool) -> None:
    first = parts[0]
    if len(parts) == 1 and not overwrite:
        acc.add_(first, alpha=scale)
        return
    wide = torch.float64 if torch.float64 in (acc.dtype, first.dtype) else torch.float32
    total = first.to(wide, copy=True)
    for part in parts[1:]:
        total.add_(part)
    if overwrite:
        acc.copy_(total.mul_(scale))
    elif acc.dtype == wide:
        acc.add_(total, alpha=scale)
    else:
        acc.copy_(total.mul_(scale).add_(acc))


@jit
def _accumulate_kernel(
    acc: tl.tensor,  # *A   [size]
    pointers: tl.tensor,  # *i64 [chunks]     addresses of the chunks, [size] each
    chunks: tl.int32,
    size: tl.int64,
    scale: tl.float64,
    CHUNK: tl.constexpr,  # dtype of the chunks
    WIDE: tl.constexpr,  # dtype of the arithmetic
    ALIGNED: tl.constexpr,  # acc and every chunk begin at multiples of 16 bytes
    OVERWRITE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program adds one tile of every chunk."""
    start = tl.program_id(0).to(tl.int64) * TILE
    if start + TILE <= size:
        index = start + tl.arange(0, TILE)
        _accumulate_tile(acc, pointers, chunks, index, size, scale, CHUNK, WIDE, ALIGNED, OVERWRITE, False)
    else:
        for turn in range(start, size, _SMALL_TILE):
            index = turn + tl.arange(0, _SMALL_TILE)
            _accumulate_tile(acc, pointers, chunks, index, size, scale, CHUNK, WIDE, ALIGNED, OVERWRITE, True)


@jit
def _accumulate_tile(
    acc: tl.tensor,
    pointers: tl.tensor,
    chunks: tl.tensor,
    index: tl.tensor,
    size: tl.tensor,
    scale: tl.tensor,
    CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    OVERWRITE: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    inside = index < size if MASKED else None
    total = tl.zeros(index.shape, WIDE)
    for chunk in range(chunks):
        part = tl.load(pointers + chunk).to(tl.pointer_type(CHUNK))
        if ALIGNED:
            part = tl.multiple_of(part, 16)
        total += convert(tl.load(part + index, mask=inside), WIDE)
    total *= tl.full(index.shape, scale, WIDE)
    if not OVERWRITE:
        total = convert(tl.load(acc + index, mask=inside), WIDE) + total
    tl.store(acc + index, convert(total, acc.dtype.element_ty), mask=inside)


def _launch(acc: torch.Tensor, chunks: torch.Tensor | Sequence[torch.Tensor], scale: float, *, overwrite: bool) -> None:
    parts = _check(acc, chunks)
    pointers = tuple([part.data_ptr() for part in parts])
    wide = tl.float64 if torch.float64 in (acc.dtype, parts[0].dtype) else tl.float32
    aligned = all(pointer % 16 == 0 for pointer in (acc.data_ptr(), *pointers))
    tile = TILE if aligned and wide == tl.float32 else SMALL_TILE
    launch(
        _accumulate_kernel,
        -(-acc.numel() // tile),
        acc.device,
        acc,
        pointer_table(pointers, acc.device),
        len(parts),
        acc.numel(),
        scale,
        CHUNK=getattr(tl, str(parts[0].dtype).removeprefix("torch.")),
        WIDE=wide,
        ALIGNED=aligned,
        OVERWRITE=overwrite,
        TILE=tile,
    )


def _check(acc: torch.Tensor, chunks: torch.Tensor | Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    parts = chunks.unbind() if isinstance(chunks, torch.Tensor) else chunks
    if len(parts) == 0:
        raise ValueError("accumulate: got no chunks, expected one or more")
    require_flat("accumulate", "acc", acc)
    require_flat("accumulate", "chunk 0", parts[0], like=acc)
    for number, part in enumerate(parts[1:], 1):
        require_flat("accumulate", f"chunk {number}", part, (parts[0].dtype,), like=acc)
    return parts


def accumulate(
    acc: torch.Tensor,
    chunks: torch.Tensor | Sequence[torch.Tensor] | Sequence[Quantized],
    scale: float = 1.0,
    *,
    overwrite: bool = False,
    block: int = 256,
) -> None:
    """Add `scale` times the sum of the chunks to the 1-D buffer `acc`; with `overwrite`, write it there instead.

    `chunks` is a sequence of 1-D buffers as long as `acc`, or one buffer of shape [n, acc.numel()]; all have one
    dtype. They may be what `quantize` made with the same `block`. `overwrite=True` in the first micro-step saves a pass
    that zeroes `acc`, which may then hold anything.

    >>> acc = torch.ones(2)
    >>> accumulate(acc, [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], scale=0.5)
    >>> acc
    tensor([3., 4.])
    """
    is_triton = backend(acc.device).is_triton
    if not isinstance(chunks, torch.Tensor) and len(chunks) and isinstance(chunks[0], Quantized):
        run = accumulate_quantized.launch_quantized if is_triton else accumulate_quantized.reference
        return run(acc, cast("Sequence[Quantized]", chunks), scale, block, overwrite=overwrite)
    plain = cast("torch.Tensor | Sequence[torch.Tensor]", chunks)
    if not is_triton:
        return reference(acc, plain, scale, overwrite=overwrite)
    return _launch(acc, plain, scale, overwrite=overwrite)
