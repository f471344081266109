"""The norm of all gradients, counted once for every sharding, and the factor that gradients are multiplied by."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mics_core.ladder import Ladder
from mics_core.ledger import Tally
from mics_core.reduce import Reduced
from mics_core.scaling import Scaling
from mics_kernels import square_sum


class Clipping:
    """What is known of the gradients of one step; all numbers stay on the device."""

    def __init__(
        self, ladder: Ladder, degree: int, scaling: Scaling | None, tally: Tally, device: torch.device
    ) -> None:
        self._ladder = ladder
        self._degree = degree
        self._scaling = scaling
        self._tally = tally
        self._device = device
        self.begin()

    def begin(self) -> None:
        """Gradients are new: nothing is known of them."""
        self._overflow: torch.Tensor | None = None
        self._factor: torch.Tensor | None = None  # to multiply gradients by that are in memory

    def clip(self, present: Sequence[Reduced], max_norm: float) -> torch.Tensor:
        """The norm before clipping; afterwards `factor` makes it at most `max_norm`."""
        norm = self._measure(present)
        if self._factor is not None:
            norm = norm * self._factor
        shrink = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        self._factor = shrink if self._factor is None else self._factor * shrink
        return norm

    def factor(self, present: Sequence[Reduced]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What gradients still are to be multiplied by, and a flag that is not 0 if the step must be skipped."""
        if self._scaling is not None and self._overflow is None:
            self._measure(present)
        return self._factor, self._overflow

    def apply(self, present: Sequence[Reduced]) -> None:
        """Multiply the gradients in memory now, for an optimizer that reads them as they are."""
        factor, _ = self.factor(present)
        if factor is not None:
            for reduced in present:
                reduced.shards.synced.mul_(factor.to(reduced.shards.synced.dtype))
                self._tally.moved("clip", 2 * reduced.shards.synced.nbytes)
        self._factor = None

    def _measure(self, present: Sequence[Reduced]) -> torch.Tensor:
        """The norm of the gradients in memory."""
        sums = torch.zeros(len(present) + 1, 2, device=self._device)
        for row, reduced in zip(sums, present, strict=False):
            self._tally.moved("square_sum", reduced.shards.synced.nbytes)
            row[0], row[1] = square_sum(reduced.shards.synced)
        total = self._ladder.total(sums.double().sum(0), self._degree)
        if self._scaling is not None and self._overflow is None:
            self._overflow = total[1].float()
            self._factor = 1 / self._scaling.scale
        return total[0].sqrt().float()
