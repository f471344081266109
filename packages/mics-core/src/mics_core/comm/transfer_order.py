"""The order in which transfers were handed to lanes, and calls were made; the ranks that must agree compare it.

A message carries no name: its place in the order says what it is. Ranks that use units in different orders would
gather one unit's bytes into another where sizes agree, and train on. So digests of the order travel with a message that
every step sends anyway: of gathers one for each copy of the parameters, whose ranks may evaluate without the others;
of all that sums gradients and brings new weights one for the whole world. That one covers calls, too, which should
be the same on all ranks, with the same numbers, and need not send anything: an optimizer's learning rate, for one.
"""

from __future__ import annotations

import zlib
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from mics_core.comm.world import World
from mics_core.errors import LifecycleError

_DIGEST = 4
"""Bytes. With their complements they take twice as many: the largest of all ranks' adds up to 255 if all are alike."""

_RECENT = 4096
"""Transfers of a lane whose names are kept for a message; the digest knows all."""

_CALLS = ""
"""Where calls are kept, as on a lane: first in the order of lanes, because they explain what is transferred."""

Lanes = dict[str, tuple[int, tuple[str, ...]]]
"""By lane: how many transfers there were, and the names of the last of them."""


@dataclass
class _Lane:
    digest: int = 0
    count: int = 0
    recent: deque[str] = field(default_factory=lambda: deque(maxlen=_RECENT))


@dataclass(frozen=True)
class _Taken:
    """What was recorded up to a question."""

    digest: bytes
    lanes: Lanes


class _Record:
    """Transfers since the last question."""

    def __init__(self) -> None:
        self._lanes: dict[str, _Lane] = defaultdict(_Lane)

    def note(self, lane: str, what: str) -> None:
        recorded = self._lanes[lane]
        recorded.digest = zlib.crc32(what.encode(), recorded.digest)
        recorded.count += 1
        recorded.recent.append(what)

    def take(self) -> _Taken:
        """What there is; what follows is recorded anew."""
        lanes, self._lanes = self._lanes, defaultdict(_Lane)
        said = repr([(name, lane.count, lane.digest) for name, lane in sorted(lanes.items())])
        digest = zlib.crc32(said.encode()).to_bytes(_DIGEST, "big")
        return _Taken(digest, {name: (lane.count, tuple(lane.recent)) for name, lane in lanes.items()})


@dataclass(frozen=True)
class Question:
    """A question to all ranks: the numbers to put into it, and what they stand for."""

    numbers: list[int]
    gathers: _Taken
    others: _Taken


class TransferOrder:
    """What one rank records of a model's transfers, and asks the other ranks."""

    def __init__(self, world: World, params: int) -> None:
        self._world = world
        self._copies = world.size // params if params > 1 else 0  # else nothing is gathered
        self._copy = world.rank // params
        self._gathers, self._others = _Record(), _Record()
        members = range(self._copy * params, (self._copy + 1) * params)
        self._sharing = world.among(members, "order of gathers")  # the ranks that gather from each other

    def note(self, lane: str, what: str, *, gather: bool) -> None:
        """A transfer of this name was handed to the lane."""
        (self._gathers if gather else self._others).note(lane, what)

    def call(self, what: str) -> None:
        """A call that all ranks make alike; what it is given belongs into the name."""
        self._others.note(_CALLS, what)

    def compare(self) -> None:
        """Raise on all ranks if they have done different things since they last compared; the host waits."""
        question = self.question()
        self.check(question, self._world.max_async(question.numbers, "comparing what ranks did").read())

    def question(self) -> Question:
        """Numbers for `World.max_async`, which finds the largest of all ranks': a digest of what all have in common,
        and a place for each copy's digest of gathers, of which this rank fills its own.
        """
        gathers, others = self._gathers.take(), self._others.take()
        numbers = _with_complement(others.digest)
        for copy in range(self._copies):
            numbers += _with_complement(gathers.digest) if copy == self._copy else [0] * (2 * _DIGEST)
        return Question(numbers, gathers, others)

    def check(self, question: Question, largest: Sequence[int]) -> None:
        """Raise on all ranks if some differ that must not, given the largest numbers of all ranks."""
        size = 2 * _DIGEST
        alike = [_is_alike(largest[place : place + size]) for place in range(0, len(largest), size)]
        if all(alike):
            return
        mine = question.gathers.lanes, question.others.lanes
        told: list[tuple[Lanes, Lanes]] = self._world.all_gather_object(mine, "comparing orders")
        if not alike[0]:
            raise _difference([others for _, others in told], self._world.ranks)
        ranks = self._world.size // self._copies
        begin = (alike.index(False) - 1) * ranks
        sharing = slice(begin, begin + ranks)
        raise _difference([gathers for gathers, _ in told[sharing]], self._world.ranks[sharing])

    def compare_gathers(self, *, wait: bool) -> None:
        """Raise on the ranks of one copy if they have gathered in different orders, where no step follows.

        Who does not wait asks all the same: or the others would wait for this rank.
        """
        if self._sharing.size == 1:
            return
        taken = self._gathers.take()
        answers = self._sharing.max_async(_with_complement(taken.digest), "comparing orders of gathers")
        if wait and not _is_alike(answers.read()):
            raise _difference(
                self._sharing.all_gather_object(taken.lanes, "comparing orders of gathers"), self._sharing.ranks
            )


def _with_complement(digest: bytes) -> list[int]:
    return [*digest, *(255 - byte for byte in digest)]


def _is_alike(largest: Sequence[int]) -> bool:
    """Whether one digest at most was told: where none was, as in a group whose messages go nowhere, all stays 0."""
    return all(a + b <= 255 for a, b in zip(largest[:_DIGEST], largest[_DIGEST:], strict=True))


def _difference(everyone: Sequence[Lanes], ranks: Sequence[int]) -> LifecycleError:
    """The first difference between the first of these ranks and another one, in a sentence."""
    for rank, theirs in zip(ranks, everyone, strict=True):
        for lane in sorted(everyone[0].keys() | theirs.keys()):
            first, other = _named(everyone[0], lane), _named(theirs, lane)
            for number in sorted(first.keys() | other.keys()):
                here, there = first.get(number), other.get(number)
                if here != there and lane == _CALLS:
                    return LifecycleError(
                        f"ranks do different things: of what they did since they last compared, number {number} is "
                        f"{here or 'nothing'} on rank {ranks[0]} and {there or 'nothing'} on rank {rank}: make the "
                        "same calls with the same numbers on all ranks, and go back to the last checkpoint"
                    )
                if here != there:
                    return LifecycleError(
                        f"ranks use units in different orders: of the transfers since they last compared, number "
                        f"{number} on the lane '{lane}' is {_called(here)} on rank {ranks[0]} and {_called(there)} on "
                        f"rank {rank}, so each has the other's bytes: let all ranks use the same units in the same "
                        "order, and go back to the last checkpoint"
                    )
    return LifecycleError(
        f"ranks use units in different orders, more than {_RECENT} transfers ago: let all ranks use the same units in "
        "the same order, and go back to the last checkpoint"
    )


def _named(lanes: Lanes, lane: str) -> dict[int, str]:
    """The names that are kept, by their number from 1."""
    count, recent = lanes.get(lane, (0, ()))
    return dict(enumerate(recent, count - len(recent) + 1))


def _called(what: str | None) -> str:
    return "nothing" if what is None else f"the {what}"
