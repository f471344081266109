"""Dynamic loss scaling for float16, without the host ever looking at a number."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from mics_core import trees
from mics_core.errors import LifecycleError
from mics_core.spec.sharding import LossScale


class LossScaling:
    """The scale of the loss, and how it changes; all of it in device memory."""

    def __init__(self, rule: LossScale, device: torch.device) -> None:
        self._rule = rule
        self._numbers = torch.tensor([rule.initial, 0.0], device=device)
        self.scale, self._good = self._numbers.unbind()  # `good` are the steps since the scale last changed
        self.entered = False  # whether a backward has begun at what `enlarge` returned
        pinned = device.type == "cuda"
        self._heard = torch.full((2,), torch.inf, device="cpu", pin_memory=pinned)  # the numbers, maybe of a step ago
        self._told = False

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

    def check_entered(self) -> None:
        """Raise if gradients came that the scale has not enlarged: they would be made too small."""
        if not self.entered:
            raise LifecycleError(
                "backward: gradients came that did not begin at what the model returned, where the loss is scaled: "
                "with Precision.fp16 call the model itself, not its parts, and make the loss of what it returns"
            )

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
        self._heard.copy_(self._numbers, non_blocking=True)
        heard, good = self._heard.tolist()
        if heard <= 1 < self._rule.largest and not good and not self._told:
            self._told = True
            warnings.warn(
                "LossScale: the scale has fallen to 1, as gradients were not finite in step after step, all of which "
                "were skipped: look for what makes the loss or a gradient infinite or NaN, or use Precision.bf16()",
                RuntimeWarning,
                stacklevel=2,
            )
