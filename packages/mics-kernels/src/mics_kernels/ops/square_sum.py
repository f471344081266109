"""square_sum: the sum of squares of a flat buffer, and whether anything in it is infinite or NaN.

One read of the buffer, one launch, nothing crosses to the host. The buffer is cut the same way every time, by its
length alone, and the partial sums are added in the same order: the same buffer gives the same bits on every run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from mics_kernels.backend import backend, constexpr, jit, launch, tl
from mics_kernels.casting import convert
from mics_kernels.checks import require_flat, without_grad
from mics_kernels.flat import SCRATCH
from mics_kernels.tables import scratch

TILE = 2048
TILE_FLOAT64 = 1024
PROGRAMS = 1024
_PROGRAMS = constexpr(PROGRAMS)
"""At most 1024 programs walk the tiles in turn: enough to fill a GPU, few enough for the last one to add up."""


ROW = 1 << 15
"""Elements that the reference sums in float32 before it adds up the sums: of so few at least five digits are right."""


class SquareSum(NamedTuple):
    """Two 0-dim tensors on the buffer's device."""

    sum: torch.Tensor
    nonfinite: torch.Tensor  # 1 if an element is infinite or NaN, else 0


@without_grad
def reference(flat: torch.Tensor, out: torch.Tensor | None = None) -> SquareSum:
    """What `square_sum` does, in torch."""
    wide = _check(flat, out)
    if flat.is_meta:
        return SquareSum(*(flat.new_empty(2, dtype=wide) if out is None else out))
    if flat.dtype == wide:
        total = _sum_of_squares(flat)
    else:  # a part at a time, so that a cache still holds what is converted when it is squared
        sums = [_sum_of_squares(part.to(wide)) for part in torch.split(flat, SCRATCH)]
        total = torch.stack(sums).sum(dtype=torch.float64)
    # A finite sum has no infinite or NaN term; on a GPU asking would be a host sync, so there all is read twice.
    finite = flat.is_cpu and math.isfinite(total.item())
    pair = torch.empty(2, dtype=wide, device=flat.device) if out is None else out
    result = SquareSum(*pair.unbind())
    result.sum.copy_(total)
    if finite:
        result.nonfinite.zero_()
    else:
        result.nonfinite.copy_(flat.isfinite().all().logical_not_())
    return result


def _sum_of_squares(flat: torch.Tensor) -> torch.Tensor:
    """Of a float32 or float64 buffer: rows in one call, for many small ones would find torch's code in no cache."""
    size = flat.numel()
    if size <= ROW:
        if flat.data_ptr() % 64:  # the bits of a dot product depend on how its input lies to cache lines
            flat = flat.clone()
        return torch.dot(flat, flat)
    if size % ROW:
        whole = size - size % ROW
        return _sum_of_squares(flat[:whole]) + _sum_of_squares(flat[whole:])
    norms = torch.linalg.vector_norm(flat.view(-1, ROW), dim=1)
    return torch.dot(norms, norms)


@jit
def _square_sum_kernel(
    flat: tl.tensor,  # *D   [size]
    out: tl.tensor,  # *S   [2]
    partials: tl.tensor,  # *f64 [PROGRAMS, 2]
    tickets: tl.tensor,  # *i32 [1]              0 between launches
    size: tl.int64,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program squares every `programs`-th tile; the one that finishes last adds up what all have found."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)  # as an argument, 1 would be a constant and not a number of the device
    total = tl.zeros([TILE], WIDE)
    strange = tl.zeros([TILE], tl.int32)
    whole = size // TILE * TILE
    for start in range(program.to(tl.int64) * TILE, whole, programs.to(tl.int64) * TILE):
        value = convert(tl.load(flat + start + tl.arange(0, TILE)), WIDE)
        total += value * value
        strange |= (value - value != 0).to(tl.int32)
    if program == programs - 1:
        index = whole + tl.arange(0, TILE)
        value = convert(tl.load(flat + index, mask=index < size, other=0), WIDE)
        total += value * value
        strange |= (value - value != 0).to(tl.int32)
    tl.store(partials + 2 * program, tl.sum(total.to(tl.float64), 0))
    tl.store(partials + 2 * program + 1, tl.max(strange, 0).to(tl.float64))
    # The partials of this program are in memory before its ticket counts; whoever draws the last ticket sees all.
    tl.debug_barrier()
    if tl.atomic_add(tickets, 1, sem="acq_rel") == programs - 1:
        lane = tl.arange(0, _PROGRAMS)
        sums = tl.load(partials + 2 * lane, mask=lane < programs, other=0, volatile=True)
        flags = tl.load(partials + 2 * lane + 1, mask=lane < programs, other=0, volatile=True)
        tl.store(out, tl.sum(sums, 0).to(WIDE))
        tl.store(out + 1, tl.max(flags, 0).to(WIDE))
        tl.store(tickets, 0)


def _launch(flat: torch.Tensor, out: torch.Tensor | None) -> SquareSum:
    wide, device = _check(flat, out), flat.device
    pair = torch.empty(2, dtype=wide, device=device) if out is None else out
    tile = TILE if wide == torch.float32 else TILE_FLOAT64
    programs = max(1, min(PROGRAMS, -(-flat.numel() // tile)))
    launch(
        _square_sum_kernel,
        programs,
        device,
        flat,
        pair,
        scratch(device, "square_sum sums", lambda: torch.empty(2 * PROGRAMS, dtype=torch.float64, device=device)),
        scratch(device, "square_sum tickets", lambda: torch.zeros(1, dtype=torch.int32, device=device)),
        flat.numel(),
        WIDE=tl.float64 if wide == torch.float64 else tl.float32,
        TILE=tile,
    )
    return SquareSum(pair[0], pair[1])


def _check(flat: torch.Tensor, out: torch.Tensor | None) -> torch.dtype:
    """Raise one sentence about what is wrong, or return the dtype of the result."""
    require_flat("square_sum", "the buffer", flat)
    wide = torch.float64 if flat.dtype == torch.float64 else torch.float32
    if out is None:
        return wide
    require_flat("square_sum", "out", out, (wide,))
    if out.numel() != 2 or out.device != flat.device:
        raise ValueError(
            f"square_sum: out has {out.numel()} elements on {out.device}, expected 2 on {flat.device}: "
            f"one for the sum, one for the flag"
        )
    return wide


def square_sum(flat: torch.Tensor, out: torch.Tensor | None = None) -> SquareSum:
    """The sum of squares of the 1-D buffer `flat`, and 1 if an element is infinite or NaN, else 0.

    Both are 0-dim float32 tensors (float64 for a float64 buffer) on the buffer's device: reading them on the host is
    up to you. With `out`, a buffer of two numbers, they are views of it, so that one collective can carry both. The
    flag looks at the elements, not at the sum, which may overflow to infinity on finite ones.

    >>> square_sum(torch.tensor([3.0, 4.0]))
    SquareSum(sum=tensor(25.), nonfinite=tensor(0.))
    """
    if not backend(flat.device).is_triton:
        return reference(flat, out)
    return _launch(flat, out)
