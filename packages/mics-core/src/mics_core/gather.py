"""When units are whole: gathered before they are needed, ahead of time where the order is known, and released after.

    AWAY -> COMING   start: the gather is handed to its lane
    COMING -> HERE   arrive: the computation waits for it
    HERE -> AWAY     release: nobody uses the unit, and it is not the next one to be used

With P = 1 a unit rests whole: it is HERE, and COMING while the optimizer's new weights arrive.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from mics_core.errors import LifecycleError
from mics_core.ladder import Ladder, Route, Way
from mics_core.lanes import DONE, Ticket
from mics_core.sharding import Sharding
from mics_core.shards import Shards


class Residence(Enum):
    """Where a whole unit is."""

    AWAY = "away"
    COMING = "coming"
    HERE = "here"


class Gathered:
    """A unit, and whether it is whole."""

    def __init__(self, unit: str, shards: list[Shards]) -> None:
        self.unit = unit
        self.shards = shards
        self.bytes = sum(part.nbytes for part in shards)
        self.users = 0  # forwards and backwards that are using it now
        self.rests = all(part.rests for part in shards)
        self.residence = Residence.HERE if self.rests else Residence.AWAY
        self.arrival: Ticket = DONE
        self.lost = False  # it did not arrive: an error is on its way up, and a late message may still write here
        self.refreshed: Ticket = DONE  # until then `shard` is not the optimizer's last word


class Gatherer:
    """Gathers and releases the units of a model, within a budget of bytes for what is gathered ahead."""

    def __init__(self, ladder: Ladder, sharding: Sharding, budget: int) -> None:
        self._ladder = ladder
        self._sharding = sharding
        self.budget = budget
        self.travels = sharding.params > 1  # else whole units are at home
        self.ahead = 0  # bytes of units that are not AWAY although nobody uses them
        self.bytes = 0  # bytes of all gathered units, beyond what rests here
        self.peak = 0

    def take(self, gathered: Gathered) -> None:
        """Someone is going to use the unit: have it on its way at least."""
        if not gathered.users and gathered.residence is not Residence.AWAY and not gathered.rests:
            self.ahead -= gathered.bytes
        gathered.users += 1
        if gathered.residence is Residence.AWAY:
            self._start(gathered)

    def arrive(self, gathered: Gathered) -> None:
        """The unit is needed now."""
        if gathered.residence is Residence.COMING:
            gathered.lost = True
            self._ladder.wait(gathered.arrival)
            gathered.lost = False
            gathered.residence = Residence.HERE

    def leave(self, gathered: Gathered, *, keep: bool) -> None:
        """One use is over; after the last one the unit is released, unless it is to be kept for the next."""
        gathered.users -= 1
        if gathered.users or gathered.rests:
            return
        self.ahead += gathered.bytes
        if not keep:
            self.release(gathered)

    def release(self, gathered: Gathered) -> None:
        """Give back the memory of a unit that nobody uses."""
        if gathered.users or gathered.rests or gathered.lost or gathered.residence is Residence.AWAY:
            return
        self.arrive(gathered)  # a message under way needs its memory
        for part in gathered.shards:
            part.release()
        gathered.residence = Residence.AWAY
        self.ahead -= gathered.bytes
        self.bytes -= gathered.bytes

    def fetch(self, coming: Iterable[Gathered]) -> None:
        """Start gathering what comes next, in this order, as far as the budget goes."""
        for gathered in coming:
            if gathered.residence is Residence.AWAY:
                if self.ahead + gathered.bytes > self.budget:
                    return
                self._start(gathered)
                self.ahead += gathered.bytes

    def refresh(self, gathered: Gathered) -> None:
        """The optimizer changed `refreshed` of this unit: bring the new weights to where gathers start from."""
        if gathered.users:
            raise LifecycleError(
                f"step: {gathered.unit} is in use by a forward or backward, so its parameters cannot change: step "
                "after the backward"
            )
        self.release(gathered)
        low, high = self._sharding.params, self._sharding.optimizer
        if low == high:
            return

        way = Way(Route.FALL, f"refresh of {gathered.unit}", "refresh", low, high)
        for part in gathered.shards:
            if part.trained:
                gathered.refreshed = self._ladder.send_down(way, part.refreshed, part.shard)
        if gathered.rests:
            gathered.arrival = gathered.refreshed
            gathered.residence = Residence.COMING

    def compare_order(self, *, wait: bool) -> None:
        """Raise on the ranks of one copy if they have gathered different units."""
        self._ladder.order.compare_gathers(wait=wait)

    def _start(self, gathered: Gathered) -> None:
        way = Way(Route.GATHER, f"gather of {gathered.unit}", "gather", 1, self._sharding.params)
        for part in gathered.shards:
            part.allocate()
            gathered.arrival = self._ladder.send_down(way, part.shard, part.incoming, after=[gathered.refreshed])
        gathered.residence = Residence.COMING
        self.bytes += gathered.bytes
        self.peak = max(self.peak, self.bytes)
