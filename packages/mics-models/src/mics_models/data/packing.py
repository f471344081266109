"""Which document each token of a packed row belongs to."""

from __future__ import annotations

from torch import Tensor


def documents(tokens: Tensor, start: int) -> Tensor:
    """Number the documents of each row of `tokens` [B, T], where `start` begins one: int64 [B, T], not decreasing.

    The rest of a document that began before the row has the number 0.
    """
    return (tokens == start).cumsum(dim=1)
