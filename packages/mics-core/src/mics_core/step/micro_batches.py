"""What `accumulate` says of micro-steps: which is the last, and how many each rank brings, which all compare."""

from __future__ import annotations

from enum import Enum

from mics_core.comm.world import World
from mics_core.errors import LifecycleError

# A rank says one number, of which 0 is left for ranks that say nothing, as in a group whose messages go nowhere: one
# more than how many it brings or, where it has no length, whether there is a micro-batch now and another after it.
_NONE, _LAST, _MORE = 253, 254, 255
_MOST = _NONE - 1


class MicroStep(Enum):
    """What `accumulate` said of the present micro-step."""

    UNMARKED = "unmarked"
    MORE_FOLLOW = "more follow"
    LAST = "last"


class Count:
    """A question to all ranks: how many micro-batches there are, or whether another one follows."""

    def __init__(self, world: World, length: int | None, *, now: bool, more: bool) -> None:
        mine = min(1 + length, _MOST) if length is not None else _MORE if more else _LAST if now else _NONE
        self._ranks = world.ranks
        self._answers = world.max_async(
            [mine * (rank == world.rank) for rank in range(world.size)], "comparing micro-batches"
        )

    def check(self) -> None:
        """Raise on all ranks if they do not bring equally many: without it they would wait for each other for ever."""
        said = {rank: number for rank, number in zip(self._ranks, self._answers.read(), strict=True) if number}
        endless = [rank for rank, number in said.items() if number >= _NONE]
        if 0 < len(endless) < len(said):
            raise LifecycleError(
                f"accumulate: ranks {endless} bring micro-batches that have no length, such as a generator's, and the "
                "others some that have, such as a list's: bring the same kind on every rank"
            )
        most = max(said.values(), default=0)
        short = [rank for rank, number in said.items() if number < most]
        if short:
            raise LifecycleError(
                f"accumulate: ranks {short} bring fewer micro-batches than the others: give every rank equally many"
            )
