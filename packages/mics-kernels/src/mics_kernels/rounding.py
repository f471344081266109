"""Stochastic rounding to bfloat16, unbiased and reproducible: in kernels and, bit for bit, in torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mics_kernels.backend import jit, tl


@dataclass(frozen=True)
class StochasticRounding:
    """Round the bf16 copy of the weights up or down at random, with the probabilities that keep its mean.

    The random bits depend on `seed`, on the step and on an element's number, nothing else. `first` is the number of
    the buffer's first element: pass a shard's place in the whole, and every sharding rounds every element alike.
    """

    seed: int
    first: int = 0


@jit
def scramble(x: tl.tensor) -> tl.tensor:
    """Mix 32 bits: every input bit flips each output bit half the time (the "lowbias32" finaliser)."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@jit
def round_stochastically(value: tl.tensor, first: tl.tensor, lane: tl.tensor, key: tl.tensor) -> tl.tensor:
    """float32 -> bfloat16, up or down with the probabilities that keep the mean.

    The random bits are a pure function of `key` and of an element's number `first + lane`, so any cut of a buffer
    into blocks, shards and launches rounds each element alike. A hash of a counter instead of Philox: a tenth of the
    instructions, and the reference can compute the same bits.
    """
    low = first.to(tl.uint32)
    number = low + lane.to(tl.uint32)
    key += (first >> 32).to(tl.uint32) * 0x9E3779B9
    noise = scramble(number ^ tl.where(number < low, key + 0x9E3779B9, key)) & 0xFFFF
    bits = value.to(tl.uint32, bitcast=True)
    # Infinities and NaNs have no neighbour: cutting off their low bits keeps what they are (arithmetic makes quiet
    # NaNs, whose mark is a high bit).
    noise = tl.where((bits & 0x7F800000) == 0x7F800000, 0, noise)
    return ((bits + noise) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


def _scramble_reference(x: torch.Tensor) -> torch.Tensor:
    """`scramble` in int64 arithmetic: torch has no unsigned 32-bit multiply that wraps."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def key_reference(seed: int, step: int) -> int:
    """The key that kernels derive from the seed and the step."""
    seed_tensor = torch.tensor(seed & 0xFFFFFFFF, dtype=torch.int64, device="cpu")
    return int(_scramble_reference(_scramble_reference(seed_tensor) ^ step))


def round_stochastically_reference(value: torch.Tensor, first: int, key: int) -> torch.Tensor:
    """`round_stochastically` of a 1-D float32 tensor whose elements have the indices first, first + 1, ..."""
    index = torch.arange(first, first + value.numel(), dtype=torch.int64, device=value.device)
    keys = (key + (index >> 32) * 0x9E3779B9) & 0xFFFFFFFF
    noise = _scramble_reference((index & 0xFFFFFFFF) ^ keys) & 0xFFFF
    bits = value.contiguous().view(torch.int32)
    noise[(bits & 0x7F800000) == 0x7F800000] = 0
    return ((bits.to(torch.int64) + noise) >> 16).to(torch.int16).view(torch.bfloat16)
