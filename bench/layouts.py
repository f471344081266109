"""The buffers that benchmarks work on: tensors as a model has them, and where they lie in a flat buffer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

SLOT = 16
"""Elements: every tensor begins at a multiple of this many in a flat buffer."""

MATRIX = 4096
"""Elements: a tensor with more is a matrix, and decays; one with fewer is a bias or a norm's gain."""


def normal(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random numbers: on zeros a GPU draws less power, and runs faster than a model's numbers ever let it."""
    return torch.randn(size, device=device).to(dtype)


def poison(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An output that shows every element nobody wrote."""
    return torch.full((size,), math.nan if dtype.is_floating_point else 99, dtype=dtype, device=device)


def block_sizes(elements: int) -> list[int]:
    """A transformer block's tensors: four matrices and eight vectors, every size a multiple of a slot."""
    width = SLOT * max(1, round(math.sqrt(elements / 12) / SLOT))
    norm, bias = [width, width], [width * n for n in (3, 1, 4, 1)]
    left = elements - 2 * sum(norm) - sum(bias)
    qkv, out, up = (left * share // 12 // SLOT * SLOT for share in (3, 1, 4))
    return [*norm, qkv, bias[0], out, bias[1], *norm, up, bias[2], left - qkv - out - up, bias[3]]


def small_sizes(count: int) -> list[int]:
    """Sizes of many small tensors; most of them leave room in their last slot."""
    sizes: list[int] = torch.randint(1, 2048, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    return sizes


@dataclass(frozen=True)
class Layout:
    """Tensors of `sizes` elements in a flat buffer, each in as many slots as it needs."""

    sizes: Sequence[int]

    @property
    def slots(self) -> list[int]:
        """Elements that belong to each tensor, its gap included."""
        return [-(-size // SLOT) * SLOT for size in self.sizes]

    @property
    def offsets(self) -> list[int]:
        """Where each tensor begins."""
        return list(itertools.accumulate(self.slots, initial=0))[:-1]

    @property
    def length(self) -> int:
        """Elements of the buffer."""
        return sum(self.slots)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Each tensor's place in a buffer, in its shape."""
        return [flat[o : o + s].view(_shape(s)) for o, s in zip(self.offsets, self.sizes, strict=True)]

    def tensors(self, dtype: torch.dtype, device: torch.device, shift: int = 0) -> list[torch.Tensor]:
        """Random tensors in memory of their own, each begun `shift` elements behind an aligned address."""
        return [normal(size + shift, dtype, device)[shift:].view(_shape(size)) for size in self.sizes]

    def pieces(self, tensors: Sequence[torch.Tensor], gap: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
        """The tensors, flattened, and what `gap` makes for the room behind each: together they fill the buffer."""
        found = []
        for tensor, size, slot in zip(tensors, self.sizes, self.slots, strict=True):
            found.append(tensor.view(-1))
            if slot > size:
                found.append(gap(slot - size))
        return found


def _shape(size: int) -> tuple[int, ...]:
    return (size // SLOT, SLOT) if size > MATRIX and size % SLOT == 0 else (size,)
