"""Dynamic loss scaling for float16, without the host ever looking at a number."""

from __future__ import annotations

from typing import Any

import torch

from mics_core import trees
from mics_core.sharding import LossScale


class Scaling:
    """The scale of the loss, and how it changes; all of it in device memory."""

    def __init__(self, rule: LossScale, device: torch.device) -> None:
        self._rule = rule
        self.scale = torch.full((), rule.initial, device=device)
        self.entered = False  # whether a backward has begun at what `enlarge` returned
        self._good = torch.zeros((), device=device)  # steps since the scale last changed

    def enlarge(self, outputs: Any) -> Any:
        """The model's outputs in float32, whose gradients enter the backward times the scale.

        Scaling the gradient of what the model returns is scaling the loss, and the user's loop needs no word of it.
        """
        return trees.convert(outputs, self._enlarge)

    def shrink(self, inputs: Any) -> Any:
        """The model's inputs, whose gradients leave the backward without the scale."""
        return trees.convert(inputs, self._shrink)

    def _shrink(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.requires_grad or not torch.is_grad_enabled():
            return tensor
        passed = tensor.view_as(tensor)  # what else the caller does with it has gradients of its own
        passed.register_hook(lambda grad: grad / self.scale)  # type: ignore[no-untyped-call]
        return passed

    def _enlarge(self, output: torch.Tensor) -> torch.Tensor:
        if not output.is_floating_point():
            return output
        wide = output.float()
        if wide is output and output.requires_grad:
            wide = output.clone()  # a hook on the model's own tensor would scale what the model does with it, too
        if wide.requires_grad:
            wide.register_hook(self._times_scale)  # type: ignore[no-untyped-call]
        return wide

    def _times_scale(self, grad: torch.Tensor) -> torch.Tensor:
        self.entered = True
        return grad * self.scale

    def state(self) -> dict[str, float]:
        """The numbers that a later run needs; the host waits for them."""
        return {"scale": self.scale.item(), "good": self._good.item()}

    def restore(self, state: dict[str, float]) -> None:
        """Continue with the numbers of another run."""
        self.scale.fill_(state["scale"])
        self._good.fill_(state["good"])

    @torch.no_grad()
    def update(self, overflow: torch.Tensor) -> None:
        """After a step: halve the scale if a gradient was not finite, double it after enough good steps."""
        bad = overflow > 0
        self._good.add_(1).masked_fill_(bad, 0)
        grow = self._good >= self._rule.patience
        factor = torch.where(bad, 0.5, torch.where(grow, 2.0, 1.0))
        self.scale.mul_(factor).clamp_(1.0, self._rule.largest)
        self._good.masked_fill_(grow, 0)
