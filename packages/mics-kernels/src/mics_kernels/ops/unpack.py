"""unpack: one flat buffer -> many tensors, in one launch: the inverse of pack.

    tensors[i] = (flat[offsets[i] : offsets[i] + tensors[i].numel()] * scale).to(tensors[i].dtype)    row-major

The parts of the buffer that hold tensors are read once and the tensors written once; gaps are not touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mics_kernels.backend import backend, jit, launch, tl
from mics_kernels.casting import scaled
from mics_kernels.checks import without_grad
from mics_kernels.flat import KIND, SHAPE, STEP, STRIDED, STRIDED_STEP, copy_scaled, flattened, places, plan
from mics_kernels.segments import _BLOCK, locate
from mics_kernels.tables import pointer_table


@without_grad
def reference(flat: torch.Tensor, tensors: Sequence[torch.Tensor], offsets: Sequence[int], scale: float = 1.0) -> None:
    """What `unpack` does, in torch."""
    placement = plan("unpack", tensors, flat, offsets, computed=scale != 1.0, into_flat=False, fills=False)
    if scale == 1.0 and placement.joinable and not placement.gaps:
        targets = [flattened(tensors[t]) for t, _ in placement.joinable]
        torch.split_with_sizes_copy(flat, placement.chunks, out=targets)
        return
    chunks = flat.split_with_sizes(placement.chunks)
    if placement.rank == 0 and scale == 1.0 and tensors:
        sources = [chunks[c] for c in placement.chunk_of]
        torch._foreach_copy_([flattened(tensor) for tensor in tensors], sources)
        return
    for tensor, chunk in zip(tensors, placement.chunk_of, strict=True):
        copy_scaled(chunks[chunk].view(tensor.shape), tensor, scale)


@jit
def _unpack_kernel(
    flat: tl.tensor,  # *u8  [length * itemsize]      bytes: KINDS says what they are
    pointers: tl.tensor,  # *i64 [segments]          addresses of the tensors
    rows: tl.tensor,  # *i64 [segments, SHAPE + 2 * RANK]
    owners: tl.tensor,  # *i32 [programs]
    scale: tl.float64,
    KINDS: tl.constexpr,  # the distinct (tensor dtype, flat dtype)
    SCALED: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    """One program fills one block of one tensor."""
    segment, row, start, count = locate(rows, owners, SHAPE + 2 * RANK)
    target = tl.load(pointers + segment)
    begin = tl.load(row) + start
    kind = tl.load(row + KIND)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            source = flat.to(tl.int64) + begin * ((KINDS[k][1].primitive_bitwidth + 7) // 8)
            _unpack_block(target, source, row, start, count, scale, KINDS[k][1], KINDS[k][0], SCALED, RANK)


@jit
def _unpack_block(
    target: tl.tensor,
    source: tl.tensor,
    row: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    scale: tl.tensor,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    SCALED: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    strided = tl.load(row + STRIDED) != 0
    block = target + start * ((TARGET.primitive_bitwidth + 7) // 8)
    aligned = ((block | source) % 16 == 0) & (count == _BLOCK)
    if aligned & (not strided):
        # A thread's share of a block of 64-bit elements takes two turns: one would fill its registers.
        WHOLE: tl.constexpr = _BLOCK if SOURCE.primitive_bitwidth + TARGET.primitive_bitwidth <= 64 else _BLOCK // 2
        wide_source = tl.multiple_of(source.to(tl.pointer_type(SOURCE)), 16)
        wide_target = tl.multiple_of(block.to(tl.pointer_type(TARGET)), 16)
        for turn in range(0, count, WHOLE):
            index = turn + tl.arange(0, WHOLE)
            tl.store(wide_target + index, scaled(tl.load(wide_source + index), scale, TARGET, SCALED))
    else:
        SHARE: tl.constexpr = STEP if RANK == 0 else STRIDED_STEP
        for turn in range(0, count, SHARE):
            index = turn + tl.arange(0, SHARE)
            inside = index < count
            place = start + index
            if RANK > 0:
                if strided:
                    place = places(row, place, RANK)
            value = scaled(
                tl.load(source.to(tl.pointer_type(SOURCE)) + index, mask=inside, other=0), scale, TARGET, SCALED
            )
            tl.store(target.to(tl.pointer_type(TARGET)) + place, value, mask=inside)


def _launch(flat: torch.Tensor, tensors: Sequence[torch.Tensor], offsets: Sequence[int], scale: float) -> None:
    placement = plan("unpack", tensors, flat, offsets, computed=scale != 1.0, into_flat=False, fills=False)
    pointers = tuple([tensors[t].data_ptr() for t in placement.tensor_of])
    launch(
        _unpack_kernel,
        placement.segments.programs,
        flat.device,
        flat.view(torch.uint8),
        pointer_table(pointers, flat.device),
        placement.segments.rows,
        placement.segments.owners,
        scale,
        KINDS=placement.kinds,
        SCALED=scale != 1.0,
        RANK=placement.rank,
    )


def unpack(flat: torch.Tensor, tensors: Sequence[torch.Tensor], offsets: Sequence[int], scale: float = 1.0) -> None:
    """Fill each tensor with the elements of the 1-D buffer `flat` from its offset on, times `scale`.

    The exact inverse of `pack`: tensors may have any dtype, shape and strides. They must not share memory with the
    buffer or with each other, nor (as `expand` makes them) with themselves.

    >>> a, b = torch.empty(2, dtype=torch.int32), torch.empty(2, 1)
    >>> unpack(torch.arange(6.0), [a, b], [0, 3])
    >>> a.tolist(), b.tolist()
    ([0, 1], [[3.0], [4.0]])
    """
    if not backend(flat.device).is_triton:
        return reference(flat, tensors, offsets, scale)
    return _launch(flat, tensors, offsets, scale)
