"""Two numbers that tell whether tensors on different ranks hold the same bits."""

from __future__ import annotations

import torch

_PART = 1 << 24
"""Words at a time: 64-bit copies of a whole tensor would take several times its memory."""


@torch.no_grad()
def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """int64 [2]: the sum of the tensor's words, and the sum of each times its place; both wrap around."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    found = torch.zeros(2, dtype=torch.int64, device=raw.device)
    for first, part in enumerate(torch.split(raw, 4 * _PART)):
        words = torch.nn.functional.pad(part, (0, -part.numel() % 4)).view(torch.int32).to(torch.int64)
        begin = first * _PART + 1
        places = torch.arange(begin, begin + words.numel(), device=words.device)
        found += torch.stack([words.sum(), places.mul_(words).sum()])
    return found
