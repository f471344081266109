"""Rows that hold several documents: the positions of their tokens, and which of them see each other.

`documents` [B, T] numbers the document of each token; wherever the number changes a new document begins.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def positions_within(documents: Tensor) -> Tensor:
    """Each token's place in its own document: [B, T], counted from 0."""
    places = torch.arange(documents.shape[1], device=documents.device)  # [T]
    begins = places * F.pad(_changes(documents), (1, 0))  # [B, T], 0 where none begins
    return places - begins.cummax(dim=1).values


def visible(documents: Tensor, mask: Tensor | None = None) -> Tensor:
    """Which token sees which: bool [B, 1, T, T], queries before keys, for all heads of all layers.

    Tokens see their own document. Where `mask` [B, T] is False is padding, which only sees padding: so it changes
    nothing elsewhere, and no token is left with nothing to see.
    """
    numbers = F.pad(_changes(documents).cumsum(dim=1), (1, 0))  # [B, T]
    if mask is not None:
        numbers = numbers.where(mask, -1)
    return (numbers[:, :, None] == numbers[:, None, :])[:, None]


def expect_rows(model: str, name: str, given: Tensor, tokens: Tensor) -> None:
    """Refuse what does not say something of each token: broadcast, it would mean something else."""
    if given.shape != tokens.shape:
        raise ValueError(
            f"{model}: {name} has the shape {tuple(given.shape)}, expected {tuple(tokens.shape)} as tokens: "
            "give one entry for each token"
        )


def _changes(documents: Tensor) -> Tensor:
    return documents[:, 1:] != documents[:, :-1]  # [B, T - 1]
