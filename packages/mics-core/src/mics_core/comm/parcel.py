"""What travels in eight bits: a range of a unit's buffer as values, scales and an exact rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from mics_core.spec.eight_bits import EightBits
from mics_core.spec.layout import BLOCK
from mics_kernels import Quantized, accumulate, quantize


@dataclass(frozen=True)
class Parcel:
    """Elements [begin, end) of a unit."""

    form: EightBits
    begin: int
    end: int
    values: torch.Tensor
    scales: torch.Tensor
    rest: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Of what travels."""
        return self.form.nbytes(self.begin, self.end)

    def tensors(self) -> list[torch.Tensor]:
        """What travels, as bytes; a rank that knows the range knows their lengths."""
        return [part.view(torch.uint8) for part in (self.values, self.scales, self.rest) if part.numel()]

    def part(self, begin: int, end: int) -> Parcel:
        """A range within this one, in the same memory."""
        before, rest_before = self.form.lengths(self.begin, begin)
        blocked, rest = self.form.lengths(begin, end)
        return Parcel(
            self.form,
            begin,
            end,
            self.values[before : before + blocked],
            self.scales[before // BLOCK : (before + blocked) // BLOCK],
            self.rest[rest_before : rest_before + rest],
        )

    def fill(self, source: torch.Tensor, base: torch.Tensor | None = None) -> None:
        """Take in the elements; with `base`, by how much those in blocks differ from it."""
        blocked = self.values.numel()
        if blocked:
            out = Quantized(self.values, self.scales)
            quantize(source[:blocked], out=out, block=BLOCK, base=None if base is None else base[:blocked])
        self.rest.copy_(source[blocked:])

    def add_difference(self, target: torch.Tensor) -> None:
        """Bring `target`, the same base everywhere, as near to the source as eight bits do; the rest is replaced."""
        blocked = self.values.numel()
        if blocked:
            accumulate(target[:blocked], [Quantized(self.values, self.scales)], block=BLOCK)
        target[blocked:].copy_(self.rest)


Addends = Sequence[torch.Tensor] | Sequence[Parcel]
"""What ranks sent for one piece."""


def add_up(target: torch.Tensor, addends: Addends, scale: float = 1.0, *, overwrite: bool) -> None:
    """Add `scale` times the sum of what ranks sent to `target`, or write it there."""
    parcels = [each for each in addends if isinstance(each, Parcel)]
    if not parcels:
        accumulate(target, [each for each in addends if isinstance(each, torch.Tensor)], scale, overwrite=overwrite)
        return
    blocked = parcels[0].values.numel()
    if blocked:
        parts = [Quantized(parcel.values, parcel.scales) for parcel in parcels]
        accumulate(target[:blocked], parts, scale, overwrite=overwrite, block=BLOCK)
    if blocked < target.numel():
        accumulate(target[blocked:], [parcel.rest for parcel in parcels], scale, overwrite=overwrite)


Plan = TypeVar("Plan")


class Room:
    """Memory for parcels, used again by each job of a lane: jobs of one lane come one after another."""

    def __init__(self, device: torch.device) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device)
        self._plans: dict[object, Any] = {}

    @property
    def nbytes(self) -> int:
        """So much memory is kept."""
        return self._bytes.nbytes

    def once(self, key: object, make: Callable[[], Plan]) -> Plan:
        """What `make` makes of this memory, once: its views cost more than a short transfer."""
        if key not in self._plans:
            plan = make()
            self._plans[key] = plan
        found: Plan = self._plans[key]
        return found

    def parcels(self, form: EightBits, ranges: Sequence[tuple[int, int]]) -> list[Parcel]:
        """One for each range, with anything in it; those given before are overwritten."""
        places, end = form.places(ranges)
        if self._bytes.numel() < end:
            self._plans.clear()
            with torch.inference_mode(False):  # a lane, where no mode of the caller's holds, writes to it
                self._bytes = self._bytes.new_empty(end)
        dtypes = (form.values, torch.float32, form.rest)
        return [
            Parcel(form, *range_, *[self._bytes[b:e].view(dtype) for (b, e), dtype in zip(parts, dtypes, strict=True)])
            for range_, parts in zip(ranges, places, strict=True)
        ]
