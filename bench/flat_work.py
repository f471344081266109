"""The work of pack, unpack, accumulate and square_sum, beside every torch idiom that does the same.

The dtypes are the runtime's: bf16 gradients into fp32 or bf16 buffers, bf16 from the wire into fp32.
"""

from __future__ import annotations

import itertools
import math
from functools import partial

import torch

from bench.layouts import SLOT, Layout, block_sizes, normal, poison
from bench.work import BF16, FP32, Candidate, Tensors, Work
from mics_kernels import accumulate, pack, square_sum, unpack


def pack_work(layout: Layout, to: torch.dtype, device: torch.device, *, scale: float = 1.0, shift: int = 0) -> Work:
    tensors = layout.tensors(BF16, device, shift)
    out, copied, joined, chunked = (poison(layout.length, to, device) for _ in range(4))
    copied.zero_()  # copies never touch the gaps, which must be zero: they need this once, ours each time
    zeros = torch.zeros(SLOT, dtype=BF16, device=device)

    def pieces() -> list[torch.Tensor]:
        return layout.pieces(tensors, lambda size: zeros[:size])

    # Like ours, each starts from tensors, a buffer and offsets: a backward brings new tensors every time. On a GPU
    # making views of them takes no device time.
    def by_copies() -> Tensors:
        torch._foreach_copy_(layout.views(copied), tensors)
        return [copied if scale == 1.0 else copied.mul_(scale)]

    def by_cat() -> Tensors:
        torch.cat(pieces(), out=joined)
        return [joined if scale == 1.0 else joined.mul_(scale)]

    def by_chunk_cat() -> Tensors:
        torch._chunk_cat(pieces(), 0, 1, out=chunked.view(1, -1))
        return [chunked if scale == 1.0 else chunked.mul_(scale)]

    return Work(
        bytes=sum(layout.sizes) * BF16.itemsize + layout.length * to.itemsize,
        ours=Candidate(partial(pack, tensors, out, layout.offsets, scale), results=lambda _: [out]),
        idioms={
            "foreach_copy": Candidate(by_copies),
            "cat": Candidate(by_cat),
            # FSDP2's copy-in. It sends addresses from pinned memory that a graph's replay would find reused.
            "chunk_cat": Candidate(by_chunk_cat, capturable=False),
        },
    )


def adding_pack_work(layout: Layout, device: torch.device) -> Work:
    """Gradients of a later micro-step, added where their sum lies."""
    tensors = layout.tensors(BF16, device, 0)
    ours, each, every = (torch.zeros(layout.length, dtype=FP32, device=device) for _ in range(3))

    def one_by_one() -> Tensors:
        for view, tensor in zip(layout.views(each), tensors, strict=True):
            view.add_(tensor)
        return [each]

    def together() -> Tensors:
        torch._foreach_add_(layout.views(every), tensors)
        return [every]

    return Work(
        bytes=sum(layout.sizes) * (BF16.itemsize + 2 * FP32.itemsize),
        ours=Candidate(partial(pack, tensors, ours, layout.offsets, add=True), results=lambda _: [ours]),
        idioms={"add_ each": Candidate(one_by_one), "foreach_add": Candidate(together)},
        tolerance=1e-5,
    )


def moving_pack_work(elements: int, device: torch.device) -> Work:
    """Gradients at addresses never seen before, in every call: no table of addresses can be reused."""
    layout, moves = Layout(block_sizes(elements)), 4200  # more than the tables that are kept
    room = normal(elements + SLOT * moves, BF16, device)
    everywhere = [layout.views(room[SLOT * move :]) for move in range(moves)]
    ours, theirs = itertools.cycle(everywhere), itertools.cycle(everywhere)
    out, copied = (poison(layout.length, FP32, device) for _ in range(2))
    offsets = layout.offsets
    return Work(
        bytes=elements * (BF16.itemsize + FP32.itemsize),
        ours=Candidate(lambda: pack(next(ours), out, offsets), results=lambda _: [out]),
        idioms={
            "foreach_copy": Candidate(
                lambda: torch._foreach_copy_(layout.views(copied), next(theirs)), results=lambda _: [copied]
            )
        },
    )


def unpack_work(layout: Layout, device: torch.device, *, shift: int = 0) -> Work:
    flat = normal(layout.length, BF16, device)
    ours, copied, split = ([t.fill_(math.nan) for t in layout.tensors(BF16, device, shift)] for _ in range(3))
    rubbish = poison(SLOT, BF16, device)

    def by_split() -> None:
        pieces = layout.pieces(split, lambda size: rubbish[:size])
        torch.split_with_sizes_copy(flat, [piece.numel() for piece in pieces], out=pieces)

    return Work(
        bytes=2 * sum(layout.sizes) * BF16.itemsize,
        ours=Candidate(partial(unpack, flat, ours, layout.offsets), results=lambda _: ours),
        idioms={
            "foreach_copy": Candidate(
                lambda: torch._foreach_copy_(copied, layout.views(flat)), results=lambda _: copied
            ),
            # FSDP2's copy-out; pinned memory as in chunk_cat
            "split_with_sizes_copy": Candidate(by_split, results=lambda _: split, capturable=False),
        },
    )


def accumulate_work(
    elements: int, device: torch.device, *, count: int, overwrite: bool = False, shift: int = 0
) -> Work:
    scale = 0.125
    stacked = normal(count * elements + shift, BF16, device)[shift:].view(count, elements)
    chunks = list(stacked.unbind())
    start = poison(elements, FP32, device) if overwrite else normal(elements, FP32, device)
    ours, added, summed = start.clone(), start.clone(), start

    def by_adding() -> Tensors:
        if not overwrite:
            for chunk in chunks:
                added.add_(chunk, alpha=scale)
            return [added]
        added.copy_(chunks[0])
        for chunk in chunks[1:]:
            added.add_(chunk)
        return [added.mul_(scale)]

    def by_sum() -> Tensors:
        if not overwrite:
            return [summed.add_(torch.sum(stacked, 0, dtype=FP32), alpha=scale)]
        torch.sum(stacked, 0, dtype=FP32, out=summed)
        return [summed.mul_(scale)]

    idioms = {"add_ each": Candidate(by_adding), "sum": Candidate(by_sum)}
    return Work(
        bytes=elements * (count * BF16.itemsize + FP32.itemsize * (1 if overwrite else 2)),
        ours=Candidate(partial(accumulate, ours, chunks, scale, overwrite=overwrite), results=lambda _: [ours]),
        idioms=idioms if count > 1 else {"add_ each": idioms["add_ each"]},
        tolerance=1e-5,  # the order of additions differs
    )


def square_sum_work(elements: int, dtype: torch.dtype, device: torch.device) -> Work:
    flat = normal(elements, dtype, device)
    pair = poison(2, FP32, device)

    def of_norm(norm: torch.Tensor) -> Tensors:
        return norm, norm.isfinite()

    def squared(returned: Tensors) -> Tensors:
        return [returned[0].square(), returned[1].logical_not().float()]

    idioms = {
        "foreach_norm": Candidate(lambda: of_norm(torch._foreach_norm([flat], 2, FP32)[0]), results=squared),
        "vector_norm": Candidate(lambda: of_norm(torch.linalg.vector_norm(flat, dtype=FP32)), results=squared),
    }
    if dtype == FP32:  # of bf16 these would round the norm to bf16, or cast the buffer first
        idioms["get_total_norm"] = Candidate(lambda: of_norm(torch.nn.utils.get_total_norm([flat])), results=squared)
        idioms["dot"] = Candidate(
            lambda: of_norm(torch.dot(flat, flat)), results=lambda back: [back[0], back[1].logical_not().float()]
        )
    return Work(
        bytes=elements * dtype.itemsize,
        ours=Candidate(partial(square_sum, flat, pair), results=lambda _: [pair[0], pair[1]]),
        idioms=idioms,
        tolerance=5e-3,  # the idioms add up in float32: of 16 million squares they lose the third digit
    )
