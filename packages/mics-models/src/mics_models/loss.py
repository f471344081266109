"""The cross-entropy of a large vocabulary in the memory of a small one.

Letters in the shape comments: N tokens, n tokens of a chunk, C width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 1 << 25
"""Logits that the loss holds at a time: 128 MB in float32, and 667 tokens of GPT-2's vocabulary."""

IGNORED = -100
"""The target of a token that is not to count in the loss, as in torch."""


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, logits_at_once: int = LOGITS_AT_ONCE
) -> Tensor:
    """The mean cross-entropy of hidden @ weight.T + bias, holding the logits of a few tokens at a time.

    `hidden` is [..., C], `weight` [V, C], `targets` [...] with -100 where nothing counts, `bias` [V]. With more than
    one chunk the backward computes each chunk's logits again: one more product with `weight`, for memory that does not
    grow with the number of tokens. As in torch the loss is NaN if no target counts.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()  # [N, C], [N]
    rows = max(1, logits_at_once // weight.shape[0])
    counted = (targets != IGNORED).sum()
    if len(targets) <= rows:
        return _summed_loss(hidden, weight, bias, targets) / counted
    total = hidden.new_zeros((), dtype=torch.float32)
    for some, goals in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
        # Nothing here is random, so there is no generator to restore.
        total = total + checkpoint(
            _summed_loss, some, weight, bias, goals, use_reentrant=False, preserve_rng_state=False
        )
    return total / counted


def _summed_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias).float()  # [n, V]
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
