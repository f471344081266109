"""Which tokens make which batch: a pure function of the seed and the sample's number, with nothing to save or restore.

Samples are numbered through the whole run. Step s of a run with B samples per step takes the samples s * B up to
(s + 1) * B, however many ranks and micro-steps share them: so every world size trains on the same batches, and a
resumed run needs no more than its step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from mics_models.data.token_files import Tokens


@dataclass(frozen=True, eq=False)
class Sampler:
    """Windows of a stream of tokens, each seen once per epoch, in an order that differs between epochs."""

    tokens: Tokens  # [tokens] of any integer dtype, or files of them
    seq: int  # tokens of a sample
    batch: int  # samples of an optimizer step: of all ranks and all micro-steps together
    seed: int

    def __post_init__(self) -> None:
        if self.seq < 1 or self.batch < 1:
            raise ValueError(f"sampler: got seq {self.seq} and batch {self.batch}, expected at least 1: raise them")
        if len(self.tokens) < 2 * self.seq:
            raise ValueError(
                f"sampler: got {len(self.tokens)} tokens, expected at least {2 * self.seq}, two samples of "
                f"{self.seq}: lower seq, or bring more data"
            )

    @property
    def windows(self) -> int:
        """Samples of an epoch."""
        return len(self.tokens) // self.seq - 1  # one less than fit: each epoch's windows begin at a shift below seq

    def start(self, sample: int) -> int:
        """The first token of a sample, numbered through the whole run."""
        epoch, index = divmod(sample, self.windows)
        shift = stable_hash(self.seed, epoch) % self.seq
        return shift + _shuffled(index, self.windows, (self.seed, epoch)) * self.seq

    def samples(self, step: int, micro_step: int = 0, micro_steps: int = 1, rank: int = 0, world: int = 1) -> range:
        """The numbers of the samples that are a rank's share of a micro-step."""
        parts = micro_steps * world
        if self.batch % parts:
            raise ValueError(
                f"sampler: a batch of {self.batch} samples cannot be cut evenly over {micro_steps} micro-steps of "
                f"{world} ranks, expected a multiple of {parts}: change the batch"
            )
        if not (0 <= micro_step < micro_steps and 0 <= rank < world):
            raise ValueError(
                f"sampler: got micro-step {micro_step} and rank {rank}, expected them below {micro_steps} and {world}: "
                "count both from 0"
            )
        share = self.batch // parts
        first = step * self.batch + (micro_step * world + rank) * share
        return range(first, first + share)

    def micro_batch(
        self, step: int, micro_step: int = 0, micro_steps: int = 1, rank: int = 0, world: int = 1
    ) -> tuple[Tensor, Tensor]:
        """A rank's share of a micro-step, int64 [samples, seq] twice: the tokens, and those that follow them."""
        starts = map(self.start, self.samples(step, micro_step, micro_steps, rank, world))
        samples = torch.stack([self.tokens[start : start + self.seq + 1].long() for start in starts])
        return samples[:, :-1], samples[:, 1:]


def stable_hash(*numbers: int) -> int:
    """64 bits that are the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big")


def _shuffled(index: int, size: int, key: tuple[int, ...]) -> int:
    """Where a permutation of range(size) puts `index`, without a table of the permutation.

    A Feistel network permutes the numbers of an even count of bits. While the result is beyond the size it goes
    through again, which leaves a permutation of those below; a power of 4 is less than 4 times too large, so fewer
    than 4 passes are expected.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (stable_hash(*key, turn, right) & mask)
        index = left << half | right
        if index < size:
            return index
