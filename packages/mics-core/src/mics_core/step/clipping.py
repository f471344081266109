"""The norm of all gradients, counted once for every sharding, and the factor that gradients are multiplied by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from mics_core.comm.counters import Counters
from mics_core.comm.ladder import Ladder
from mics_core.step.loss_scaling import LossScaling
from mics_core.unit.unit import Unit
from mics_kernels import square_sum


class Clipping:
    """What is known of the gradients of one step; all numbers stay on the device."""

    def __init__(
        self, ladder: Ladder, degree: int, scaling: LossScaling | None, counters: Counters, device: torch.device
    ) -> None:
        self._ladder = ladder
        self._degree = degree
        self._scaling = scaling
        self._counters = counters
        self._device = device
        self._fused: set[int] = set()  # numbers of units whose optimizer multiplies by the factor as it reads
        self.begin()

    def begin(self) -> None:
        """Gradients are new: nothing is known of them."""
        self.factor: torch.Tensor | None = None
        """What gradients are still to be multiplied by."""
        self.overflow: torch.Tensor | None = None
        """With a loss scale, a flag that is not 0 if a gradient is not finite, so that the step must be skipped."""

    def leave_to(self, units: Iterable[Unit]) -> None:
        """The optimizer of these units multiplies by `factor` as it reads their gradients."""
        self._fused.update(unit.number for unit in units)

    def clip(self, present: Sequence[Unit], max_norm: float) -> torch.Tensor:
        """Make the norm at most `max_norm`; returns the norm before."""
        norm = self._measure(present)
        if self.factor is not None:
            norm = norm * self.factor
        shrink = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        self.factor = shrink if self.factor is None else self.factor * shrink
        if not all(unit.number in self._fused for unit in present):
            self.apply(present)
        return norm

    def find_overflow(self, present: Sequence[Unit]) -> None:
        """Let `overflow` and `factor` be known before a step, also without a clip."""
        if self._scaling is not None and self.overflow is None:
            self._measure(present)

    def apply(self, present: Sequence[Unit]) -> None:
        """Multiply the gradients in memory now, for an optimizer that reads them as they are."""
        if self.factor is not None:
            for unit in present:
                unit.trained.grad_mean.mul_(self.factor.to(unit.trained.grad_mean.dtype))
                self._counters.moved("clip", 2 * unit.trained.grad_mean.nbytes)
        self.factor = None

    def _measure(self, present: Sequence[Unit]) -> torch.Tensor:
        """The norm of the gradients in memory."""
        wide = torch.float64 if present and present[0].trained.grad_mean.dtype == torch.float64 else torch.float32
        sums = torch.zeros(len(present) + 1, 2, dtype=wide, device=self._device)
        for row, unit in zip(sums, present, strict=False):
            self._counters.moved("square_sum", unit.trained.grad_mean.nbytes)
            square_sum(unit.trained.grad_mean, row)
        total = self._ladder.total(sums.double().sum(0), self._degree)
        if self._scaling is not None and self.overflow is None:
            self.overflow = total[1].float()
            self.factor = 1 / self._scaling.scale
        return total[0].sqrt().float()
