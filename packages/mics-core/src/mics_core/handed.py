"""What this rank has handed to its lanes, for ranks to compare: what a message is, its place in the order alone tells.

Ranks that use units in different orders would gather one unit's bytes into another where sizes agree, and train on.
So a digest of the order travels with a message that every step sends anyway.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest

from mics_core.errors import LifecycleError

DIGITS = 4
"""Bytes of a digest."""

_MANY = 1 << 16
"""Jobs of a lane that are remembered. Who never steps hands in more and more, and all ranks forget the same ones."""


class Handed:
    """The jobs of each lane since ranks last compared."""

    def __init__(self) -> None:
        self._jobs: dict[str, list[str]] = defaultdict(list)
        self._compared: dict[str, list[str]] = {}

    def note(self, lane: str, what: str) -> None:
        """A job of this name was handed to the lane."""
        jobs = self._jobs[lane]
        jobs.append(what)
        if len(jobs) > _MANY:
            del jobs[: _MANY // 2]

    def digest(self) -> list[int]:
        """Numbers from 0 to 255 for `World.ask`, which finds the largest of all ranks'; what follows counts anew.

        The complement is there so that the largest of both add up to 255 only where all ranks have the same.
        """
        self._compared, self._jobs = dict(self._jobs), defaultdict(list)
        text = "\n".join("\n".join([lane, *jobs]) for lane, jobs in sorted(self._compared.items()))
        digits = zlib.crc32(text.encode()).to_bytes(DIGITS, "big")
        return [*digits, *(255 - digit for digit in digits)]

    @staticmethod
    def is_alike(largest: Sequence[int]) -> bool:
        """Whether all ranks had the same digest."""
        return all(a + b == 255 for a, b in zip(largest[:DIGITS], largest[DIGITS:], strict=True))

    @property
    def compared(self) -> dict[str, list[str]]:
        """What the last digest was of."""
        return self._compared


def difference(everyone: Sequence[dict[str, list[str]]]) -> LifecycleError:
    """What tells the first difference between rank 0 and another one."""
    for rank, theirs in enumerate(everyone):
        for lane in sorted(everyone[0].keys() | theirs.keys()):
            pairs = zip_longest(everyone[0].get(lane, ()), theirs.get(lane, ()), fillvalue="nothing")
            for number, (first, other) in enumerate(pairs, 1):
                if first != other:
                    return LifecycleError(
                        f"ranks use units in different orders: transfer {number} of this step on the lane '{lane}' is "
                        f"the {first} on rank 0 and the {other} on rank {rank}, so each has the other's bytes: let all "
                        "ranks use the same units in the same order, and go back to the last checkpoint"
                    )
    raise AssertionError("the digests of two ranks differ, and what they are of does not")
