"""adamw: one AdamW update of a flat shard, and the copy of the weights that the next forward computes with.

    g  = grad * clip
    m  = m + (1 - beta1) * (g - m)                          exp_avg
    v  = beta2 * v + (1 - beta2) * g * g                    exp_avg_sq
    p  = p * (1 - lr * decay) - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)     master
    weights = p, rounded to their dtype;    grad = 0 if asked

One pass: 16 bytes read (master, two moments, gradient) and 12 + 2 written per element, 4 more to zero the gradient.
Learning rate, step, clip factor and skip flag are read from device memory: nothing waits for the host.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from mics_kernels.backend import backend, constexpr, jit, launch, tl
from mics_kernels.casting import convert
from mics_kernels.checks import FLOATS, require_flat, require_scalar, without_grad
from mics_kernels.rounding import (
    StochasticRounding,
    key_reference,
    round_stochastically,
    round_stochastically_reference,
    scramble,
)
from mics_kernels.segments import _BLOCK, FIELDS, Run, Segments, locate
from mics_kernels.tables import constant

TILE = 1024
_TILE = constexpr(TILE)
"""Elements of a block in flight at once: four inputs of 8 registers a thread."""

_STEP = constexpr(256)
"""Likewise where a block is short or not aligned to 16 bytes."""

_FIELDS = constexpr(FIELDS)


class _Buffers(NamedTuple):
    """One flat shard's memory."""

    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    grad: torch.Tensor
    weights: torch.Tensor | None

    def part(self, begin: int, end: int) -> _Buffers:
        if end - begin == self.master.numel():
            return self  # five slices take longer than the update of a small shard
        weights = None if self.weights is None else self.weights[begin:end]
        return _Buffers(
            self.master[begin:end],
            self.exp_avg[begin:end],
            self.exp_avg_sq[begin:end],
            self.grad[begin:end],
            weights,
        )


class _Settings(NamedTuple):
    """What is to be done with it."""

    lr: float | torch.Tensor
    step: float | torch.Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float | torch.Tensor
    segments: Segments
    clip: torch.Tensor | None
    skip: torch.Tensor | None
    zero_grad: bool
    rounding: StochasticRounding | None


@without_grad
def reference(buffers: _Buffers, settings: _Settings) -> None:
    """What `adamw` does, by torch's own fused AdamW, at a time as much as a cache can hold."""
    rates, decays = _numbers(settings.lr), _numbers(settings.weight_decay)
    step = torch.as_tensor(settings.step, dtype=torch.float32, device=buffers.master.device)
    skipped = settings.skip is not None and bool(settings.skip)
    for run in settings.segments.runs:
        part = buffers.part(run.begin, run.end)
        if not skipped:
            members: dict[tuple[float, float], list[int]] = {}
            for place, number in enumerate(run.segments):
                own = rates[number % len(rates)], decays[number % len(decays)]
                members.setdefault(own, []).append(place)
            _update_part(part, settings, step, run, members)
        if settings.zero_grad:
            part.grad.zero_()


def _update_part(
    part: _Buffers, settings: _Settings, step: torch.Tensor, run: Run, members: dict[tuple[float, float], list[int]]
) -> None:
    gradient = part.grad.to(torch.float32)
    if settings.clip is not None:
        # A gradient that will be zeroed may be overwritten: that saves a pass over new memory.
        gradient = gradient.mul_(settings.clip) if settings.zero_grad else gradient * settings.clip
    updated = (part.master, gradient, part.exp_avg, part.exp_avg_sq)
    pieces = [buffer.split_with_sizes(run.sizes) if len(run.sizes) > 1 else [buffer] for buffer in updated]
    for (lr, decay), places in members.items():
        masters, grads, exp_avgs, exp_avg_sqs = ([piece[place] for place in places] for piece in pieces)
        torch._fused_adamw_(
            masters, grads, exp_avgs, exp_avg_sqs, [], [step] * len(places),
            lr=lr, beta1=settings.betas[0], beta2=settings.betas[1], weight_decay=decay, eps=settings.eps,
            amsgrad=False, maximize=False,
        )  # fmt: skip
    if part.weights is not None and settings.rounding is not None:
        key = key_reference(settings.rounding.seed, int(step))
        first = settings.rounding.first + run.begin
        part.weights.copy_(round_stochastically_reference(part.master, first, key))
    elif part.weights is not None:
        part.weights.copy_(part.master)


def _numbers(value: float | torch.Tensor) -> list[float]:
    if not isinstance(value, torch.Tensor):
        return [value]
    return [value.item()] if value.numel() == 1 else value.tolist()


@jit
def _adamw_kernel(
    master: tl.tensor,  # *f32 [size]
    exp_avg: tl.tensor,  # *f32 [size]
    exp_avg_sq: tl.tensor,  # *f32 [size]
    grad: tl.tensor,  # *G   [size]
    weights: tl.tensor,  # *W   [size]                  None where there are none
    rows: tl.tensor,  # *i64 [segments, FIELDS]
    owners: tl.tensor,  # *i32 [programs]
    lr: tl.tensor,  # *f32 [segments] or [1]
    decay: tl.tensor,  # *f32 [segments] or [1]
    step: tl.tensor,  # *f32 [1]
    clip: tl.tensor,  # *f32 [1] or None
    skip: tl.tensor,  # *f32 [1] or None
    one_minus_beta1: tl.float32,
    beta2: tl.float32,
    one_minus_beta2: tl.float32,
    log_beta1: tl.float32,
    log_beta2: tl.float32,
    eps: tl.float32,
    seed: tl.int64,
    first: tl.int64,
    LR_STRIDE: tl.constexpr,  # 1: one for each segment; 0: one for all
    DECAY_STRIDE: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    """One program updates one block of one segment."""
    segment, row, start, count = locate(rows, owners, _FIELDS)
    begin = tl.load(row) + start
    now = tl.load(step)
    rate = tl.load(lr + segment * LR_STRIDE)
    shrink = 1 - rate * tl.load(decay + segment * DECAY_STRIDE)
    rate = rate / _one_minus_power(log_beta1, now)
    spread = tl.sqrt(_one_minus_power(log_beta2, now))
    factor = None
    if clip is not None:
        factor = tl.load(clip)
    live = True
    if skip is not None:
        live = tl.load(skip) == 0
    key = None
    if STOCHASTIC:
        key = scramble(scramble(seed.to(tl.uint32)) ^ now.to(tl.uint32))
    buffers = (master, exp_avg, exp_avg_sq, grad, weights)
    numbers = (factor, rate, shrink, spread, one_minus_beta1, beta2, one_minus_beta2, eps)
    if (begin % 16 == 0) & (count == _BLOCK):
        for turn in range(0, count, _TILE):
            place = tl.multiple_of(begin + turn, 16)
            lane = tl.arange(0, _TILE)
            _adamw_tile(buffers, numbers, place, lane, None, live, key, first, ZERO_GRAD)
    else:
        for turn in range(0, count, _STEP):
            lane = tl.arange(0, _STEP)
            inside = lane < count - turn
            _adamw_tile(buffers, numbers, begin + turn, lane, inside, live, key, first, ZERO_GRAD)


@jit
def _adamw_tile(
    buffers: tl.tuple,
    numbers: tl.tuple,
    place: tl.tensor,
    lane: tl.tensor,
    inside: tl.tensor,  # None if every lane is
    live: tl.tensor,
    key: tl.tensor,
    first: tl.tensor,
    ZERO_GRAD: tl.constexpr,
) -> None:
    master, exp_avg, exp_avg_sq, grad, weights = buffers
    factor, rate, shrink, spread, one_minus_beta1, beta2, one_minus_beta2, eps = numbers
    index = place + lane
    if live:
        g = convert(tl.load(grad + index, mask=inside), tl.float32)
        m = tl.load(exp_avg + index, mask=inside)
        v = tl.load(exp_avg_sq + index, mask=inside)
        p = tl.load(master + index, mask=inside)
        if factor is not None:
            g *= factor
        m += one_minus_beta1 * (g - m)
        v = beta2 * v + one_minus_beta2 * g * g
        p = p * shrink - rate * (m / (tl.sqrt(v) / spread + eps))
        tl.store(exp_avg + index, m, mask=inside)
        tl.store(exp_avg_sq + index, v, mask=inside)
        tl.store(master + index, p, mask=inside)
        if weights is not None:
            if key is not None:
                w = round_stochastically(p, first + place, lane, key)
            else:
                w = convert(p, weights.dtype.element_ty)
            tl.store(weights + index, w, mask=inside)
    if ZERO_GRAD:
        tl.store(grad + index, tl.zeros(index.shape, grad.dtype.element_ty), mask=inside)


@jit
def _one_minus_power(log_base: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """1 - base ** exponent without the cancellation that would cost the first steps four of their seven digits."""
    x = log_base * exponent
    series = x
    term = x
    for n in tl.static_range(2, 13):
        term *= x / n
        series += term
    return tl.where(x > -0.7, -series, 1 - tl.exp(x))


def _launch(buffers: _Buffers, settings: _Settings) -> None:
    device, (beta1, beta2) = buffers.master.device, settings.betas
    lr, step = (
        value if isinstance(value, torch.Tensor) else torch.full((), value, dtype=torch.float32, device=device)
        for value in (settings.lr, settings.step)
    )
    decay = settings.weight_decay
    if not isinstance(decay, torch.Tensor):  # unlike the others it stays what it is, so that it can be kept
        number = float(decay)
        decay = constant(device, ("number", number), lambda: torch.full((), number, device=device))
    launch(
        _adamw_kernel,
        settings.segments.programs,
        device,
        *buffers,
        *(settings.segments.rows, settings.segments.owners),
        *(lr, decay, step, settings.clip, settings.skip),
        *(1 - beta1, beta2, 1 - beta2),
        math.log(beta1) if beta1 else -math.inf,
        math.log(beta2) if beta2 else -math.inf,
        settings.eps,
        settings.rounding.seed & 0xFFFFFFFF if settings.rounding else 0,
        settings.rounding.first if settings.rounding else 0,
        LR_STRIDE=int(lr.numel() > 1),
        DECAY_STRIDE=int(decay.numel() > 1),
        ZERO_GRAD=settings.zero_grad,
        STOCHASTIC=settings.rounding is not None,
    )


def _segments(segments: Segments | None, master: torch.Tensor) -> Segments:
    if segments is not None:
        return segments
    size, device = master.numel(), master.device
    return constant(device, ("everything", size), lambda: Segments.build([0], [size], device))


def _check(buffers: _Buffers, settings: _Settings) -> None:
    master, weights, pieces, device = buffers.master, buffers.weights, settings.segments, buffers.master.device
    for name, buffer in zip(_Buffers._fields, buffers, strict=True):
        dtypes = FLOATS[:3] if name in ("grad", "weights") else FLOATS[:1]
        if buffer is not None:
            require_flat("adamw", name, buffer, dtypes, like=master)
    if pieces.rows.device != device or (pieces.sizes and pieces.offsets[-1] + pieces.sizes[-1] > master.numel()):
        raise ValueError(
            f"adamw: segments end at {pieces.offsets[-1] + pieces.sizes[-1]} on {pieces.rows.device}, expected at most "
            f"{master.numel()} on {device}: build them for this buffer"
        )
    for name, value in (("step", settings.step), ("clip", settings.clip), ("skip", settings.skip)):
        if isinstance(value, torch.Tensor):
            require_scalar("adamw", name, value, device)
        elif value is not None and (name != "step" or not value >= 1):
            expected = "a count that begins at 1" if name == "step" else f"a float32 tensor on {device}, or None"
            raise ValueError(f"adamw: {name} is {value!r}, expected {expected}")
    for name in ("lr", "weight_decay"):
        value = getattr(settings, name)
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            require_scalar("adamw", name, value, device)
        elif isinstance(value, torch.Tensor):
            require_flat("adamw", name, value, FLOATS[:1], like=pieces.rows[:, 0])
        elif name == "lr" and not value >= 0:
            raise ValueError(f"adamw: lr is {value!r}, expected 0 or more: updates go against the gradient already")
    beta1, beta2 = settings.betas
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and settings.eps >= 0):
        raise ValueError(
            f"adamw: betas are {settings.betas} and eps {settings.eps}, expected 0 <= beta < 1 and eps >= 0"
        )
    if settings.rounding is not None and (weights is None or weights.dtype != torch.bfloat16):
        kind = "absent" if weights is None else str(weights.dtype)
        raise ValueError(f"adamw: weights are {kind}, expected bfloat16 for stochastic rounding: pass rounding=None")


def adamw(
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    lr: float | torch.Tensor,
    step: float | torch.Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | torch.Tensor = 0.01,
    segments: Segments | None = None,
    clip: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    zero_grad: bool = False,
    rounding: StochasticRounding | None = None,
) -> None:
    """Update `master` and its moments in place from `grad`, and write the new weights to `weights` in its dtype.

    All are 1-D buffers of one length: `master` and the moments float32, `grad` and `weights` float32, bf16 or fp16.

    lr, step, clip, skip: one float32 number each, in device memory (for lr and step a plain number will do, at the
        cost of a tiny launch). `step` counts updates from 1. Gradients are multiplied by `clip`. If `skip` is not 0
        nothing is updated; `zero_grad` still zeroes the gradient.
    weight_decay: one number, or with `segments` a float32 tensor on the device with one for each; likewise `lr`.
    segments: the pieces of the buffers to update; without it, everything. The rest is left as it is.
    rounding: round the bf16 `weights` stochastically instead of to the nearest.

    >>> p, m, v, g = torch.ones(4), torch.zeros(4), torch.zeros(4), torch.full((4,), 0.5)
    >>> adamw(p, m, v, g, lr=0.1, step=1, weight_decay=0.0)
    >>> p
    tensor([0.9000, 0.9000, 0.9000, 0.9000])
    """
    settings = _Settings(
        lr, step, betas, eps, weight_decay, _segments(segments, master), clip, skip, zero_grad, rounding
    )
    buffers = _Buffers(master, exp_avg, exp_avg_sq, grad, weights)
    _check(buffers, settings)
    if master.is_meta:
        return  # there is nothing to compute
    run = _launch if backend(master.device).is_triton else reference
    run(buffers, settings)
