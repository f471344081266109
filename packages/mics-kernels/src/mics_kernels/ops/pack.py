"""pack: many tensors -> one flat buffer, in one launch.

    out[offsets[i] : offsets[i] + tensors[i].numel()] = (tensors[i] * scale).to(out.dtype)    row-major; += with `add`
    out[everywhere else]                              = 0                                     as it was with `add`

Each tensor is read once and the buffer written once: (bytes of an input + bytes of an output) per element, and with
`add` the output's again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mics_kernels.backend import backend, jit, launch, tl
from mics_kernels.casting import convert, scaled
from mics_kernels.checks import without_grad
from mics_kernels.flat import (
    KIND,
    SCRATCH,
    SHAPE,
    STEP,
    STRIDED,
    STRIDED_STEP,
    FlatPlan,
    copy_scaled,
    flattened,
    places,
    plan,
)
from mics_kernels.ops import accumulate
from mics_kernels.segments import _BLOCK, locate
from mics_kernels.tables import pointer_table


@without_grad
def reference(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    offsets: Sequence[int],
    scale: float = 1.0,
    *,
    add: bool = False,
) -> None:
    """What `pack` does, in torch."""
    placement = _plan(tensors, out, offsets, scale, add=add)
    if out.is_meta:
        return  # there is nothing to compute
    if add:
        chunks = out.split_with_sizes(placement.chunks)
        targets = [chunks[c] for c in placement.chunk_of]
        sources = [flattened(tensor.contiguous()) for tensor in tensors]
        if out.numel() <= SCRATCH and tensors:
            torch._foreach_add_(targets, sources, alpha=scale)
        else:
            for target, source in zip(targets, sources, strict=True):
                accumulate.reference(target, [source], scale)
        return
    if scale == 1.0 and placement.joinable:
        pieces = [zeros if zeros is not None else flattened(tensors[t]) for t, zeros in placement.joinable]
        torch.cat(pieces, out=out)
        return
    chunks = out.split_with_sizes(placement.chunks)
    if len(placement.gaps) * 1024 > out.numel():
        out.zero_()  # cheaper than many views of a small buffer
    elif placement.gaps:
        torch._foreach_zero_([chunks[gap] for gap in placement.gaps])
    # The cache still holds a small float32 buffer when all of it is scaled after the copies.
    scale_last = out.dtype == torch.float32 and out.numel() <= SCRATCH and placement.fits_float32
    if placement.rank == 0 and (scale == 1.0 or scale_last) and tensors:
        targets = [chunks[c] for c in placement.chunk_of]
        torch._foreach_copy_(targets, [flattened(tensor) for tensor in tensors])
        if scale != 1.0:
            out.mul_(scale)
        return
    for tensor, chunk in zip(tensors, placement.chunk_of, strict=True):
        copy_scaled(tensor, chunks[chunk].view(tensor.shape), scale)


@jit
def _pack_kernel(
    out: tl.tensor,  # *u8  [length * itemsize]      bytes: KINDS says what they are
    pointers: tl.tensor,  # *i64 [segments]          addresses of the tensors; 0 for a gap
    rows: tl.tensor,  # *i64 [segments, SHAPE + 2 * RANK]
    owners: tl.tensor,  # *i32 [programs]
    scale: tl.float64,
    KINDS: tl.constexpr,  # the distinct (tensor dtype, flat dtype)
    SCALED: tl.constexpr,
    ADD: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    """One program writes one block of one tensor, or of one gap."""
    segment, row, start, count = locate(rows, owners, SHAPE + 2 * RANK)
    source = tl.load(pointers + segment)
    begin = tl.load(row) + start
    kind = tl.load(row + KIND)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            target = out.to(tl.int64) + begin * ((KINDS[k][1].primitive_bitwidth + 7) // 8)
            _pack_block(target, source, row, start, count, scale, KINDS[k][0], KINDS[k][1], SCALED, ADD, RANK)


@jit
def _pack_block(
    target: tl.tensor,
    source: tl.tensor,
    row: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    scale: tl.tensor,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    SCALED: tl.constexpr,
    ADD: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    filled = source != 0
    strided = tl.load(row + STRIDED) != 0
    block = source + start * ((SOURCE.primitive_bitwidth + 7) // 8)
    aligned = ((block | target) % 16 == 0) & (count == _BLOCK)
    if aligned & (not strided):
        # A thread's share of a block of 64-bit elements takes two turns: one would fill its registers.
        WHOLE: tl.constexpr = _BLOCK if SOURCE.primitive_bitwidth + TARGET.primitive_bitwidth <= 64 else _BLOCK // 2
        wide_source = tl.multiple_of(block.to(tl.pointer_type(SOURCE)), 16)
        wide_target = tl.multiple_of(target.to(tl.pointer_type(TARGET)), 16)
        whole = tl.multiple_of(tl.where(filled, _BLOCK, 0), _BLOCK)  # or a mask would split the load
        for turn in range(0, count, WHOLE):
            index = turn + tl.arange(0, WHOLE)
            value = tl.load(wide_source + index) if ADD else tl.load(wide_source + index, mask=index < whole, other=0)
            if ADD:
                value = _sum(tl.load(wide_target + index), value, scale, SCALED)
            else:
                value = scaled(value, scale, TARGET, SCALED)
            tl.store(wide_target + index, value)
    else:
        readable = tl.where(filled, count, 0)
        SHARE: tl.constexpr = STEP if RANK == 0 else STRIDED_STEP
        for turn in range(0, count, SHARE):
            index = turn + tl.arange(0, SHARE)
            place = start + index
            if RANK > 0:
                if strided:
                    place = places(row, place, RANK)
            value = tl.load(source.to(tl.pointer_type(SOURCE)) + place, mask=index < readable, other=0)
            written = target.to(tl.pointer_type(TARGET)) + index
            if ADD:
                value = _sum(tl.load(written, mask=index < count, other=0), value, scale, SCALED)
            else:
                value = scaled(value, scale, TARGET, SCALED)
            tl.store(written, value, mask=index < count)


@jit
def _sum(there: tl.tensor, value: tl.tensor, scale: tl.tensor, SCALED: tl.constexpr) -> tl.tensor:
    """`there + value * scale` in the dtype of `there`, computed in float32, or in float64 where either side is."""
    WIDE: tl.constexpr = tl.float64 if (value.dtype == tl.float64) or (there.dtype == tl.float64) else tl.float32
    return convert(convert(there, WIDE) + scaled(value, scale, WIDE, SCALED), there.dtype)


def _plan(
    tensors: Sequence[torch.Tensor], out: torch.Tensor, offsets: Sequence[int], scale: float, *, add: bool = False
) -> FlatPlan:
    return plan("pack", tensors, out, offsets, computed=add or scale != 1.0, into_flat=True, fills=not add)


def _launch(
    tensors: Sequence[torch.Tensor], out: torch.Tensor, offsets: Sequence[int], scale: float, *, add: bool = False
) -> None:
    placement = _plan(tensors, out, offsets, scale, add=add)
    pointers = tuple([tensors[t].data_ptr() if t >= 0 else 0 for t in placement.tensor_of])
    launch(
        _pack_kernel,
        placement.segments.programs,
        out.device,
        out.view(torch.uint8),
        pointer_table(pointers, out.device),
        placement.segments.rows,
        placement.segments.owners,
        scale,
        KINDS=placement.kinds,
        SCALED=scale != 1.0,
        ADD=add,
        RANK=placement.rank,
    )


def pack(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    offsets: Sequence[int],
    scale: float = 1.0,
    *,
    add: bool = False,
) -> None:
    """Copy each tensor, times `scale`, into the 1-D buffer `out` at its offset; zero the rest of `out`.

    With `add` the tensors are added to what is in `out`, and the rest of `out` stays as it is.

    Tensors may have any dtype, shape (empty ones too) and strides; elements go in row-major order and are converted
    to the buffer's dtype. Offsets count elements of `out` and must not make tensors overlap. `out` must not share
    memory with the tensors. A scale other than 1, and `add`, need floating point on both sides.

    >>> flat = torch.empty(6)
    >>> pack([torch.tensor([1, 2]), torch.tensor([[3.0], [4.0]])], flat, [0, 3], scale=1.0)
    >>> flat
    tensor([1., 2., 0., 3., 4., 0.])
    """
    if not backend(out.device).is_triton:
        return reference(tensors, out, offsets, scale, add=add)
    return _launch(tensors, out, offsets, scale, add=add)
