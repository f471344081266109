"""BERT's masking: a pure function of the seed and the sample's number, with nothing to save or restore.

Its randomness is hashing with integers, so that the bits are the same on every machine and device, for every world
size, rank and number of micro-steps, and in a resumed run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mics_models.data.sampler import stable_hash
from mics_models.loss import IGNORED

LOW = (1 << 32) - 1  # the low 32 bits


def mask(
    tokens: Tensor, samples: Sequence[int], *, seed: int, mask_token: int, vocab: int, share: float = 0.15
) -> tuple[Tensor, Tensor]:
    """What a masked language model is shown of `tokens` [B, T], and what it has to tell: inputs, targets, both int64.

    `samples` are the numbers of the rows in the whole run, as `Sampler.samples` gives them. In each row `share` of the
    positions are chosen, rounded, and at least one. Of the chosen about 80 % become `mask_token`, 10 % any token below
    `vocab`, and 10 % stay. Targets are the tokens at the chosen positions, and IGNORED elsewhere.
    """
    if len(samples) != len(tokens):
        raise ValueError(
            f"mask: got {len(tokens)} rows of tokens and {len(samples)} numbers of samples, expected a number for each "
            "row: take them from Sampler.samples with the arguments of micro_batch"
        )
    if not 0 < share <= 1:
        raise ValueError(f"mask: got the share {share}, expected more than 0 and at most 1: BERT's is 0.15")
    length, tokens = tokens.shape[1], tokens.long()
    order, fate, drawn = (_noise((seed, purpose), samples, length).to(tokens.device) for purpose in range(3))
    last = order.kthvalue(max(1, round(share * length)), dim=1, keepdim=True).values  # a row's noise has no two equal
    chosen = order <= last  # [B, T]
    fate = fate % 10
    inputs = torch.where(chosen & (fate < 8), mask_token, tokens)
    inputs = torch.where(chosen & (fate == 8), drawn % vocab, inputs)
    return inputs, torch.where(chosen, tokens, IGNORED)


def _noise(key: tuple[int, ...], samples: Sequence[int], length: int) -> Tensor:
    """32 random bits for each position of each sample, int64 [B, T]."""
    rows = torch.tensor([stable_hash(*key, int(sample)) & LOW for sample in samples])  # [B]
    return _mixed(rows[:, None] ^ _mixed(torch.arange(length)))


def _mixed(bits: Tensor) -> Tensor:
    """A permutation of the 32-bit numbers that changes about half the bits when one bit changes: MurmurHash3's."""
    # Constants above 2**31 are given less 2**32: the low 32 bits of a product are the same, and it fits in 63.
    bits = (bits ^ bits >> 16) * (0x85EBCA6B - (1 << 32)) & LOW
    bits = (bits ^ bits >> 13) * (0xC2B2AE35 - (1 << 32)) & LOW
    return bits ^ bits >> 16
