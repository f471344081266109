"""Faults, planted one at a time into the runtime that is imported, never into its files: each a line left out or moved.

Twelve of our own thinking, two that this runtime had, nine of kinds that were published of others (named by their
issue), two of R4 and R5.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mics_core.comm.ladder import Ladder, Route, Transfer
from mics_core.comm.lanes import DONE, StreamLane, Work, _do, _StreamWork
from mics_core.comm.questions import Answers
from mics_core.comm.recorded import RecordedStream
from mics_core.lifecycle import Lifecycle
from mics_core.unit.gather import Gatherer
from mics_core.unit.reduce import Reducer, _Ring
from mics_core.unit.shards import Shards
from mics_core.unit.unit import ShardedState, Unit
from training import Setting

_ACCUMULATING = Setting((2, 2, 8), micro_steps=3)


@dataclass(frozen=True)
class PlantedFault:
    owner: type
    method: str
    wrong: Any
    scenario: str = "plain"
    setting: Setting = _ACCUMULATING
    between_ranks: bool = False  # seen only where several ranks are compared
    unseen_by_players: bool = False  # it breaks a rule, and the bytes that this scenario compares stay the same


@contextmanager
def planted(fault: PlantedFault) -> Iterator[None]:
    with patch.object(fault.owner, fault.method, fault.wrong):
        yield


def _submit(*, waits: bool = True, waits_for_default: bool = False, after: bool = True, early: bool = False) -> Any:
    """StreamLane.submit, as it is but for what is left out."""

    def submit(self: Any, what: str, job: Any, others: Sequence[Work] = ()) -> Work:
        if waits:
            self._stream.wait_stream(self._streams._compute if waits_for_default else self._streams.current_stream())
        with self._streams.stream(self._stream), torch.no_grad():
            for earlier in others if after else ():
                earlier.wait()
            event = self._streams.Event()
            if early:
                event.record(self._stream)
            _do(what, job)
            if not early:
                event.record(self._stream)
        return _StreamWork(event, self._streams)

    # RecordedLane calls it with `after` by place.
    return lambda self, what, job, after=(): submit(self, what, job, after)


def _unwaited(_: Gatherer, unit: Unit) -> None:
    if unit.state is ShardedState.UNSHARDING:
        unit.state = ShardedState.UNSHARDED


_start = Gatherer._start


def _start_before_refresh(self: Gatherer, unit: Unit) -> None:
    unit.refreshing = DONE
    _start(self, unit)


_free = Gatherer.free


def _free_before_arrival(self: Gatherer, unit: Unit) -> None:
    with patch.object(Gatherer, "wait_unshard", lambda *_: None):
        _free(self, unit)


def _bring_under_a_refresh(self: Lifecycle, unit: Unit) -> None:
    if unit.trained.written:
        unit.trained.round_master()
        self._gatherer.refresh(unit, exact=True)


_next = _Ring.next


def _never_busy(self: _Ring, size: int, device: torch.device) -> tuple[Tensor, Work]:
    return _next(self, size, device)[0], DONE


def _fresh(self: _Ring, size: int, device: torch.device) -> tuple[Tensor, Work]:
    return torch.empty(size, dtype=self.dtype, device=device), DONE


_finish, _hop1, _hop2 = Reducer.finish, Reducer.hop1, Reducer.hop2


def _finish_unwaited(self: Reducer) -> list[Unit]:
    with patch.object(self._ladder, "wait", lambda _: None):
        return _finish(self)


def _hop1_unwaited(self: Reducer, unit: Unit, grads: Any) -> None:
    with patch.object(self._ladder, "wait", lambda _: None):
        _hop1(self, unit, grads)


def _hop2_before_hop1(self: Reducer, unit: Unit) -> None:
    unit.reducing = DONE
    _hop2(self, unit)


_reduce_scatter_async, _all_gather_async, _everyone = (
    Ladder.reduce_scatter_async,
    Ladder.all_gather_async,
    Ladder._everyone,
)


def _after_nothing(self: Ladder, transfer: Transfer, buffer: Tensor, finish: Any, **_: Any) -> Work:
    return _reduce_scatter_async(self, transfer, buffer, finish)


def _legs_unordered(
    self: Ladder,
    transfer: Transfer,
    piece: Tensor,
    whole: Tensor,
    after: Any = (),
    coding: Any = None,  # noqa: ARG001
) -> Work:
    work: Work = DONE
    for low, high in reversed(self.rungs.legs(transfer.low, transfer.high)):
        begin, end = self.range(whole.numel() * transfer.low, low, within=transfer.low)
        job = partial(self.all_gather, transfer, piece, whole[begin:end], low, high)
        work = self.submit(transfer.route, self.scope_above(low), transfer.what, job, after)
        piece = whole[begin:end]
    return work


def _leg_with_its_own_buffer(self: Ladder, transfer: Transfer, buffer: Tensor, finish: Any, after: Any = ()) -> Work:
    """The first leg takes memory on its lane, and lets go of it as soon as the second leg has been issued."""
    legs = self.rungs.legs(transfer.low, transfer.high)
    if len(legs) == 1:
        return _reduce_scatter_async(self, transfer, buffer, finish, after)
    (low, node), (_, high) = legs
    held: list[Tensor] = []

    def first() -> None:
        parts = self.reduce_scatter(transfer, buffer, low, node)
        held.append(parts[0].clone())

    work = self.submit(transfer.route, self.scope_above(low), transfer.what, first, after)

    def last() -> None:
        finish(self.reduce_scatter(transfer, held.pop(), node, high))

    return self.submit(transfer.route, self.scope_above(node), transfer.what, last, [work])


def _everyone_unwaited(self: Ladder, level: int, rows: Tensor, what: str) -> Tensor:
    with patch.object(self, "wait", lambda _: None):
        return _everyone(self, level, rows, what)


_reduce_scatter = Ladder.reduce_scatter


def _over_the_gathers_groups(self: Ladder, route: Route, action: str, buffer: Tensor, low: int, high: int) -> Any:
    shared = {key: self._groups.get((Route.GATHER, key[1]), group) for key, group in self._groups.items()}
    with patch.object(self, "_groups", shared):
        return _reduce_scatter(self, route, action, buffer, low, high)


_allocate = Shards.allocate


def _taken_elsewhere(self: Any) -> None:
    if self._streams is not None and not self.stays_whole:
        with self._streams.stream(RecordedStream(self._streams, "another")):
            _allocate(self)
            self._streams.current_stream()  # here the recording sees it
        self._taken_on = self._streams.current_stream()


def _home_not_told(self: Any) -> None:
    self._taken_on = None
    if not self.stays_whole:
        self._storage.resize_(0)


_prefetch = Gatherer.prefetch


def _past_the_next_on_odd_ranks(self: Gatherer, coming: Iterable[Unit]) -> None:
    units = list(coming)
    _prefetch(self, units[self._ladder.rank % 2 :])


FAULTS: dict[str, PlantedFault] = {
    "a gather's end is not waited for": PlantedFault(Gatherer, "wait_unshard", _unwaited),
    "a lane does not wait for its caller": PlantedFault(StreamLane, "submit", _submit(waits=False)),
    "a gather does not wait for the refresh": PlantedFault(Gatherer, "_start", _start_before_refresh),
    "a unit is freed before it has arrived": PlantedFault(
        Gatherer, "free", _free_before_arrival, "changing", Setting((4, 4, 4))
    ),
    "a ring's buffer is filled while it travels": PlantedFault(_Ring, "next", _never_busy),
    "a lane does not wait for what comes before": PlantedFault(StreamLane, "submit", _submit(after=False)),
    "an event is recorded before its job": PlantedFault(StreamLane, "submit", _submit(early=True)),
    "a step does not wait for hop 2": PlantedFault(Reducer, "finish", _finish_unwaited),
    "hop 2 does not wait for hop 1": PlantedFault(Reducer, "hop2", _hop2_before_hop1),
    "a reduce-scatter waits for nothing": PlantedFault(
        Ladder, "reduce_scatter_async", _after_nothing, setting=Setting((2, 2, 8), "fp32")
    ),
    "legs of a gather do not wait for each other": PlantedFault(
        Ladder, "all_gather_async", _legs_unordered, setting=Setting((8, 8, 8))
    ),
    "a norm does not wait for other ranks": PlantedFault(Ladder, "_everyone", _everyone_unwaited),
    "a loop left early leaves gathers under the step": PlantedFault(
        Lifecycle, "free", lambda _: None, "leaving_early", Setting((2, 2, 8), clip=False, prefetch=1 << 20)
    ),
    "what users wrote is rounded under a refresh": PlantedFault(Lifecycle, "_bring", _bring_under_a_refresh, "writing"),
    # As published.
    "pytorch#180665: a lane's buffer is freed while another lane reads it": PlantedFault(
        Ladder, "reduce_scatter_async", _leg_with_its_own_buffer, setting=Setting((8, 8, 8))
    ),
    "pytorch#180889: nothing keeps a gradient's buffer while it travels": PlantedFault(_Ring, "next", _fresh),
    "pytorch#181218: a backward adds gradients under the reduction before": PlantedFault(
        Reducer, "hop1", _hop1_unwaited, "leaving_early", Setting((1, 1, 8))
    ),
    "Megatron-LM#5788: resize_(0) without a word to the stream that took it": PlantedFault(
        Shards, "free", _home_not_told, "forward_elsewhere", Setting((2, 2, 8), micro_steps=3, prefetch=1 << 20)
    ),
    "Megatron-LM#6187: taken on one stream, freed to another": PlantedFault(Shards, "allocate", _taken_elsewhere),
    "Megatron-LM#5222: a double buffer is filled under a reduce-scatter": PlantedFault(
        _Ring, "busy_until", lambda *_: None, setting=Setting((4, 4, 4))
    ),
    "DeepSpeed#5080: a failed wait is passed over": PlantedFault(_StreamWork, "wait", lambda _: None),
    "DeepSpeed#8061: a lane waits for the default stream alone": PlantedFault(
        StreamLane, "submit", _submit(waits_for_default=True), "own_stream"
    ),
    "pytorch#177098: two lanes share a communicator": PlantedFault(
        Ladder, "reduce_scatter", _over_the_gathers_groups, unseen_by_players=True
    ),
    # Of the rules that are left.
    "ranks gather ahead in different orders": PlantedFault(
        Gatherer, "prefetch", _past_the_next_on_odd_ranks, between_ranks=True
    ),
    "the host reads answers before they are there": PlantedFault(
        Answers, "read", lambda self: self.numbers.tolist(), unseen_by_players=True
    ),
}
