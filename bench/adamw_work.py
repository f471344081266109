"""adamw's work: clip, update, bf16 copy of the weights, zeroed gradient; ours in one pass, torch's in several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.layouts import MATRIX, Layout, normal, poison
from bench.work import BF16, FP32, Candidate, Work
from mics_kernels import Segments, adamw

LR, BETAS, EPS, DECAY, STEP, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 10.0, 0.5


@dataclass(frozen=True)
class Shard:
    """The buffers that one way of doing the update works on."""

    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    grad: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def random(cls, elements: int, device: torch.device) -> Shard:
        master, exp_avg, exp_avg_sq, grad = (normal(elements, FP32, device) for _ in range(4))
        return cls(master, exp_avg, exp_avg_sq.square_(), grad, poison(elements, BF16, device))

    def clone(self) -> Shard:
        return Shard(*(buffer.clone() for buffer in vars(self).values()))

    def candidate(self, call: Callable[[], Any], gradient: torch.Tensor, *, capturable: bool = True) -> Candidate:
        """Before each call the gradient, which the call zeroes, comes back."""
        return Candidate(call, lambda: self.grad.copy_(gradient), capturable, lambda _: list(vars(self).values()))


def adamw_work(layout: Layout, device: torch.device) -> Work:
    """Clip, update, bf16 copy, zeroed gradient; weight decay for the layout's matrices only."""
    decays = [DECAY if size > MATRIX or len(layout.sizes) == 1 else 0.0 for size in layout.sizes]
    one = partial(torch.tensor, dtype=FP32, device=device)
    first = Shard.random(layout.length, device)
    ours, multiplied, optimized = (first.clone() for _ in range(3))
    update = partial(
        adamw, ours.master, ours.exp_avg, ours.exp_avg_sq, ours.grad, ours.weights,
        lr=one(LR), step=one(STEP), betas=BETAS, eps=EPS, weight_decay=one(decays),
        segments=Segments.build(layout.offsets, layout.sizes, device), clip=one(CLIP), zero_grad=True,
    )  # fmt: skip
    return Work(
        bytes=layout.length * (16 + 12 + 2 + 4),
        ours=ours.candidate(update, first.grad),
        idioms={
            "AdamW(fused=True)": optimized.candidate(
                _by_optimizer(optimized, layout, decays, one), first.grad, capturable=False
            ),
        }
        # A graph does not capture the optimizer's Python; what it launches, it does.
        | (
            {"mul_, _fused_adamw_": multiplied.candidate(_by_fused(multiplied, layout, decays, one), first.grad)}
            if device.type == "cuda"
            else {}
        ),
        tolerance=1e-5,
    )


def _by_fused(
    shard: Shard, layout: Layout, decays: list[float], one: Callable[..., torch.Tensor]
) -> Callable[[], None]:
    """torch's fused kernel itself, without the optimizer's Python."""
    clip, step = one(CLIP), one(STEP)

    def update(decay: float) -> Callable[[], object]:
        masters, grads, exp_avgs, exp_avg_sqs = (
            [view for view, own in zip(layout.views(buffer), decays, strict=True) if own == decay]
            for buffer in (shard.master, shard.grad, shard.exp_avg, shard.exp_avg_sq)
        )
        return partial(
            torch._fused_adamw_, masters, grads, exp_avgs, exp_avg_sqs, [], [step] * len(masters),
            lr=LR, beta1=BETAS[0], beta2=BETAS[1], weight_decay=decay, eps=EPS,
            amsgrad=False, maximize=False,
        )  # fmt: skip

    updates = [update(decay) for decay in dict.fromkeys(decays)]

    def call() -> None:
        shard.grad.mul_(clip)
        for each in updates:
            each()
        shard.weights.copy_(shard.master)
        shard.grad.zero_()

    return call


def _by_optimizer(
    shard: Shard, layout: Layout, decays: list[float], one: Callable[..., torch.Tensor]
) -> Callable[[], None]:
    """torch.optim.AdamW resumed at our step, and around it what it leaves to others."""
    clip = one(CLIP)
    groups: dict[float, list[torch.nn.Parameter]] = {decay: [] for decay in decays}
    state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    places = zip(*(layout.views(b) for b in (shard.master, shard.grad, shard.exp_avg, shard.exp_avg_sq)), strict=True)
    for decay, (master, grad, exp_avg, exp_avg_sq) in zip(decays, places, strict=True):
        parameter = torch.nn.Parameter(master)
        parameter.grad = grad
        groups[decay].append(parameter)
        state[parameter] = {"step": one(STEP - 1), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    members = [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]
    optimizer = torch.optim.AdamW(members, lr=LR, betas=BETAS, eps=EPS, fused=True)
    optimizer.state.update(state)

    def call() -> None:
        shard.grad.mul_(clip)
        optimizer.step()
        shard.weights.copy_(shard.master)
        shard.grad.zero_()

    return call
