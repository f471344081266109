"""When units are whole: gathered before they are needed, ahead of time where the order is known, and freed after.

    SHARDED -> UNSHARDING      unshard, prefetch: the gather is handed to its lane
    UNSHARDING -> UNSHARDED    wait_unshard: the computation waits for it
    UNSHARDED -> SHARDED       reshard, free: nobody uses the unit, and it is not the next one to be used

With P = 1 a unit rests whole: it is UNSHARDED, and UNSHARDING while the optimizer's new weights arrive.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mics_core.comm.ladder import Coding, Ladder, Route, Transfer
from mics_core.comm.parcel import Parcel
from mics_core.errors import LifecycleError
from mics_core.spec.sharding import Sharding
from mics_core.unit.unit import ShardedState, Unit


class Gatherer:
    """Gathers and frees the units of a model, within a budget of bytes for what is gathered ahead."""

    def __init__(self, ladder: Ladder, sharding: Sharding, budget: int) -> None:
        self._ladder = ladder
        self._sharding = sharding
        self.budget = budget
        self.travels = sharding.params > 1  # else whole units are at home
        self.ahead = 0  # bytes of units that are not SHARDED although nobody uses them
        self.bytes = 0  # bytes of all gathered units, beyond what rests here
        self.peak = 0

    def unshard(self, unit: Unit) -> None:
        """Someone is going to use the unit: have it on its way at least."""
        if not unit.uses and unit.state is not ShardedState.SHARDED and not unit.stays_whole:
            self.ahead -= unit.nbytes
        unit.uses += 1
        if unit.state is ShardedState.SHARDED:
            self._start(unit)

    def wait_unshard(self, unit: Unit) -> None:
        """The unit is needed now."""
        if unit.state is ShardedState.UNSHARDING:
            unit.lost = True
            self._ladder.wait(unit.unsharding)
            unit.lost = False
            unit.state = ShardedState.UNSHARDED

    def reshard(self, unit: Unit, *, keep: bool) -> None:
        """One use is over; after the last one the unit is freed, unless it is to be kept for the next."""
        unit.uses -= 1
        if unit.uses or unit.stays_whole:
            return
        self.ahead += unit.nbytes
        if not keep:
            self.free(unit)

    def free(self, unit: Unit) -> None:
        """Give back the memory of a unit that nobody uses."""
        if unit.uses or unit.stays_whole or unit.lost or unit.state is ShardedState.SHARDED:
            return
        self.wait_unshard(unit)  # a message under way needs its memory
        for part in unit.parts:
            part.free()
        unit.state = ShardedState.SHARDED
        self.ahead -= unit.nbytes
        self.bytes -= unit.nbytes

    def prefetch(self, coming: Iterable[Unit]) -> None:
        """Start gathering what comes next, in this order, as far as the budget goes."""
        for unit in coming:
            if unit.state is ShardedState.SHARDED:
                if self.ahead + unit.nbytes > self.budget:
                    return
                self._start(unit)
                self.ahead += unit.nbytes

    def refresh(self, unit: Unit, *, exact: bool = False) -> None:
        """Bring new weights to where gathers start from: after a step, or `exact` those in `refreshed`.

        After a step these are in `refreshed`, too, unless differences from it are sent in eight bits.
        """
        if unit.uses:
            raise LifecycleError(
                f"step: {unit.name} is in use by a forward or backward, so its parameters cannot change: step after "
                "the backward"
            )
        self.free(unit)
        low, high = self._sharding.params, self._sharding.optimizer
        if low == high:
            return

        if unit.trains:
            shards, coding = unit.trained, None
            if shards.sends_differences and not exact:
                coding = Coding(lambda mine: mine.fill(shards.master, shards.refreshed), _add_difference)
            form = None if coding is None else shards.forms.refresh
            transfer = Transfer(Route.REFRESH, f"refresh of {unit.name}", "refresh", low, high, form)
            unit.refreshing = self._ladder.all_gather_async(transfer, shards.refreshed, shards.shard, coding=coding)
        if unit.stays_whole:
            unit.unsharding = unit.refreshing
            unit.state = ShardedState.UNSHARDING

    def compare_order(self, *, wait: bool) -> None:
        """Raise on the ranks of one copy if they have gathered different units."""
        self._ladder.order.compare_gathers(wait=wait)

    def _start(self, unit: Unit) -> None:
        transfer = Transfer(Route.GATHER, f"gather of {unit.name}", "gather", 1, self._sharding.params)
        for part in unit.parts:
            part.allocate()
            # The last refresh writes `shard`, so the gather reads it after that.
            unit.unsharding = self._ladder.all_gather_async(
                transfer, part.shard, part.incoming, after=[unit.refreshing]
            )
        unit.state = ShardedState.UNSHARDING
        self.bytes += unit.nbytes
        self.peak = max(self.peak, self.bytes)


def _add_difference(shard: torch.Tensor, came: Parcel) -> None:
    came.add_difference(shard)
