"""Where N tensors lie in one flat buffer: checked once, then kept with its launch table. Shared by pack and unpack."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mics_kernels.backend import INSTALLED, constexpr, jit, tl
from mics_kernels.segments import FIELDS, Segments
from mics_kernels.tables import constant

KIND = constexpr(FIELDS)
STRIDED = constexpr(FIELDS + 1)
SHAPE = constexpr(FIELDS + 2)
"""Columns of a row behind those of every segment table; a strided tensor's shape and strides follow."""

STEP = constexpr(512)
STRIDED_STEP = constexpr(128)
"""Elements per turn of the loop over a block that is short, strided or not aligned to 16 bytes: the division that
finds a strided element takes registers."""

SCRATCH = 1 << 18
"""Elements that the references work on at a time: few enough for scratch memory to stay in a CPU's cache (a core's own
has 1 or 2 MB), enough to keep its cores busy in between."""

JOINED_ZEROS = 4096
"""The widest gap whose zeros are kept in memory to be copied from."""

NUMERIC = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "int1",
}
"""The dtypes that are converted into each other, and Triton's names for them."""

CARRIERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}
"""Where nothing is converted an integer of the same size carries the bits, so any dtype passes, NaNs unharmed."""


@dataclass(frozen=True, eq=False)
class FlatPlan:
    """A checked placement of tensors in a flat buffer."""

    chunks: tuple[int, ...]  # sizes of tensors and gaps in the buffer's order; they sum to its length
    chunk_of: tuple[int, ...]  # tensor -> its number among the chunks
    gaps: tuple[int, ...]  # the chunks that no tensor fills
    segments: Segments  # what programs work on: each tensor, and each gap if gaps are to be filled
    tensor_of: tuple[int, ...]  # segment -> its tensor, or -1 for a gap
    kinds: tuple[tuple[Any, Any], ...]  # distinct (tensor dtype, flat dtype), as Triton's dtypes
    rank: int  # dimensions to walk for strided tensors; 0 if all are contiguous
    fits_float32: bool  # no tensor is float64
    joinable: tuple[tuple[int, torch.Tensor | None], ...]  # if one `torch.cat` makes the buffer: its tensors and zeros


def plan(
    op: str,
    tensors: Sequence[torch.Tensor],
    flat: torch.Tensor,
    offsets: Sequence[int],
    *,
    computed: bool,
    into_flat: bool,
    fills: bool,
) -> FlatPlan:
    """Check that `tensors` lie in `flat` at `offsets`, and where; a placement seen before costs one look-up.

    computed: whether elements are computed with, and not only converted. fills: whether gaps are filled with zeros.
    """
    if isinstance(tensors, torch.Tensor):
        raise _not_tensors(op, "one tensor")
    try:
        # Few objects: behind a large copy no cache holds them any more, and each that is looked at takes 0.1 us.
        described = tuple(
            [(t.dtype, t.numel() if t.is_contiguous() else (t.shape, t.stride()), t.device) for t in tensors]
        )
    except AttributeError:  # what is no tensor; asking each first takes a tenth of a small pack's time
        raise _not_tensors(op, [type(t).__name__ for t in tensors]) from None
    key = (op, described, tuple(offsets), flat.dtype, flat.shape, flat.stride(), computed, fills)
    return constant(flat.device, key, lambda: _build(op, tensors, flat, tuple(offsets), computed, into_flat, fills))


def _not_tensors(op: str, wrong: str | list[str]) -> ValueError:
    return ValueError(f"{op}: got {wrong}, expected a sequence of tensors: leave out a gradient that is None")


def _build(
    op: str,
    tensors: Sequence[torch.Tensor],
    flat: torch.Tensor,
    offsets: tuple[int, ...],
    computed: bool,
    into_flat: bool,
    fills: bool,
) -> FlatPlan:
    if flat.ndim != 1 or not flat.is_contiguous():
        raise ValueError(
            f"{op}: the flat buffer has shape {tuple(flat.shape)} and strides {flat.stride()}, expected one "
            f"contiguous dimension: pass a 1-D buffer or a slice of one"
        )
    if len(tensors) != len(offsets):
        raise ValueError(f"{op}: got {len(tensors)} tensors and {len(offsets)} offsets, expected one offset a tensor")
    for number, tensor in enumerate(tensors):
        _check_tensor(op, number, tensor, flat, computed, into_flat)

    sizes = [tensor.numel() for tensor in tensors]
    chunks, owners = _cut(op, flat.numel(), offsets, sizes)
    chunk_of = {owner: chunk for chunk, owner in enumerate(owners)}
    segments, tensor_of, kinds, rank = _segments(tensors, flat, chunks, owners, computed, fills)
    return FlatPlan(
        chunks=tuple(chunks),
        chunk_of=tuple(chunk_of[number] for number in range(len(tensors))),
        gaps=tuple(chunk for chunk, owner in enumerate(owners) if owner < 0),
        segments=segments,
        tensor_of=tensor_of,
        kinds=kinds,
        rank=rank,
        fits_float32=all(tensor.dtype != torch.float64 for tensor in tensors),
        joinable=_joinable(tensors, flat, chunks, owners) if rank == 0 else (),
    )


def _joinable(
    tensors: Sequence[torch.Tensor], flat: torch.Tensor, chunks: Sequence[int], owners: Sequence[int]
) -> tuple[tuple[int, torch.Tensor | None], ...]:
    """The pieces of a CPU buffer that `torch.cat` can join, the cheapest way to fill it: equal dtypes, small gaps."""
    gaps = [size for size, owner in zip(chunks, owners, strict=True) if owner < 0]
    if flat.device.type != "cpu" or max(gaps, default=0) > JOINED_ZEROS or any(t.dtype != flat.dtype for t in tensors):
        return ()
    zeros = {size: torch.zeros(size, dtype=flat.dtype, device=flat.device) for size in gaps}
    return tuple((t, None if t >= 0 else zeros[size]) for t, size in zip(owners, chunks, strict=True))


def _cut(op: str, length: int, offsets: Sequence[int], sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Sizes of tensors and gaps in the buffer's order, and whose each is (-1: nobody's)."""
    chunks: list[int] = []
    owners: list[int] = []
    end = 0
    # An empty tensor sorts before a full one at the same offset: it takes no room there.
    for number in sorted(range(len(sizes)), key=lambda n: (offsets[n], sizes[n])):
        offset, size = offsets[number], sizes[number]
        if offset < 0 or offset + size > length:
            raise ValueError(
                f"{op}: tensor {number} would lie at [{offset}, {offset + size}), expected it inside the flat "
                f"buffer of {length} elements: check its offset"
            )
        if offset < end:
            raise ValueError(
                f"{op}: tensor {number} would begin at {offset}, expected {end} or more, where the tensor before it "
                f"ends: offsets must not make tensors overlap"
            )
        if offset > end:
            chunks.append(offset - end)
            owners.append(-1)
        chunks.append(size)
        owners.append(number)
        end = offset + size
    if end < length:
        chunks.append(length - end)
        owners.append(-1)
    return chunks, owners


def _segments(
    tensors: Sequence[torch.Tensor],
    flat: torch.Tensor,
    chunks: Sequence[int],
    owners: Sequence[int],
    computed: bool,
    fills: bool,
) -> tuple[Segments, tuple[int, ...], tuple[tuple[Any, Any], ...], int]:
    """The launch table: a row for each chunk that programs work on, with its kind and its walk."""
    walks = [_collapse(tensor) for tensor in tensors]
    rank = max((len(walk) for walk in walks), default=0)
    dtypes = [tensor.dtype for tensor in tensors] or [flat.dtype]  # gaps are zeroed as some kind, too
    # Sorted: the same dtypes in another order must not compile another kernel.
    kinds = sorted({_kind(dtype, flat.dtype, computed) for dtype in dtypes}, key=str)
    offsets, sizes, tensor_of, extra = [], [], [], []
    for offset, size, owner in zip(itertools.accumulate(chunks, initial=0), chunks, owners, strict=False):
        if owner < 0 and not fills:
            continue
        walk = walks[owner] if owner >= 0 else []
        kind = kinds.index(_kind(tensors[owner].dtype, flat.dtype, computed)) if owner >= 0 else 0
        padded = [(1, 0)] * (rank - len(walk)) + walk
        offsets.append(offset)
        sizes.append(size)
        tensor_of.append(owner)
        extra.append([kind, int(bool(walk)), *(extent for extent, _ in padded), *(stride for _, stride in padded)])
    columns = torch.tensor(extra, dtype=torch.int64, device="cpu").view(len(extra), 2 + 2 * rank)
    return Segments.build(offsets, sizes, flat.device, columns), tuple(tensor_of), tuple(kinds), rank


def _check_tensor(
    op: str, number: int, tensor: torch.Tensor, flat: torch.Tensor, computed: bool, into_flat: bool
) -> None:
    if tensor.device != flat.device:
        raise ValueError(
            f"{op}: tensor {number} is on {tensor.device}, expected {flat.device}, where the flat buffer is: move it"
        )
    if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"{op}: tensor {number} is {tensor.layout} or a lazy view, expected plain memory: resolve it")
    if not into_flat and torch._debug_has_internal_overlap(tensor) == 1:
        raise ValueError(
            f"{op}: tensor {number} shares memory with itself (shape {tuple(tensor.shape)}, strides "
            f"{tensor.stride()}), expected a place of its own for each element: unpack into what was expanded"
        )
    if computed and not (tensor.is_floating_point() and flat.is_floating_point()):
        raise ValueError(
            f"{op}: tensor {number} is {tensor.dtype} and the flat buffer {flat.dtype}, expected floating point on "
            f"both sides of a scale or a sum: pass scale=1.0 and add=False, or convert"
        )
    same = tensor.dtype == flat.dtype and not computed
    known = tensor.dtype in NUMERIC and flat.dtype in NUMERIC
    if not known and not (same and tensor.element_size() in CARRIERS):
        raise ValueError(
            f"{op}: tensor {number} is {tensor.dtype} and the flat buffer {flat.dtype}, expected the same dtype or "
            f"two of {', '.join(str(d).removeprefix('torch.') for d in NUMERIC)}: convert it first"
        )


def _kind(tensor: torch.dtype, flat: torch.dtype, computed: bool) -> tuple[Any, Any]:
    if tensor == flat and not computed:
        names = CARRIERS[tensor.itemsize], CARRIERS[tensor.itemsize]
    else:
        names = NUMERIC[tensor], NUMERIC[flat]
    return (getattr(tl, names[0]), getattr(tl, names[1])) if INSTALLED else names


def _collapse(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """The fewest (extent, stride) pairs that walk a tensor in row-major order; none if it is contiguous."""
    if tensor.is_contiguous():
        return []
    walk: list[tuple[int, int]] = []
    for extent, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if extent == 1:
            continue
        if walk and walk[-1][1] == extent * stride:
            walk[-1] = (walk[-1][0] * extent, stride)
        else:
            walk.append((extent, stride))
    return walk


@jit
def places(row: tl.tensor, number: tl.tensor, RANK: tl.constexpr) -> tl.tensor:
    """The memory offsets of the elements that have the row-major numbers `number` in a strided tensor."""
    rest = number.to(tl.int64)
    place = tl.zeros_like(rest)
    for back in tl.static_range(RANK):
        extent = tl.load(row + SHAPE + RANK - 1 - back)
        stride = tl.load(row + SHAPE + 2 * RANK - 1 - back)
        place += (rest % extent) * stride
        rest = rest // extent
    return place


def flattened(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor in one dimension; itself if it has no more, which is four times faster than a view."""
    return tensor if tensor.ndim == 1 else tensor.flatten()


def copy_scaled(source: torch.Tensor, target: torch.Tensor, scale: float) -> None:
    """target = (source * scale).to(target.dtype), multiplied in the wider of the two dtypes, float32 or more."""
    if scale == 1.0:
        target.copy_(source)
    elif source.dtype == target.dtype:
        torch.mul(source, scale, out=target)
    elif source.is_contiguous() and target.is_contiguous():
        wide = torch.promote_types(torch.promote_types(source.dtype, target.dtype), torch.float32)
        scratch = torch.empty(min(SCRATCH, source.numel()), dtype=wide, device=source.device)
        for part, filled in zip(*[torch.split(flattened(each), SCRATCH) for each in (source, target)], strict=True):
            if target.dtype == wide:
                filled.copy_(part).mul_(scale)
            else:
                filled.copy_(scratch[: part.numel()].copy_(part).mul_(scale))
    else:
        dense = torch.empty(source.shape, dtype=target.dtype, device=target.device)
        copy_scaled(source.contiguous(), dense, scale)
        target.copy_(dense)
