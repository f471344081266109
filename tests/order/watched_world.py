"""A recorded world that tells its recording of groups by name, and of the memory of questions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mics_core.comm.counters import Counters
from mics_core.comm.groups import Group, Membership, Messages
from mics_core.comm.questions import Answers
from mics_core.comm.recorded import RecordedGroup, RecordedWorld
from recording import Recording


class WatchedWorld(RecordedWorld):
    def __init__(self, size: int, rank: int) -> None:
        self.recording = Recording()
        super().__init__(size, rank, program=self.recording)

    def group(self, members: Sequence[int], name: str) -> Group:
        return _WatchedGroup(self.recording, Membership(tuple(members), members.index(self.rank), name))

    def max_async(self, mine: Sequence[int], what: str) -> Answers:
        answers = super().max_async(mine, what)
        if self.size > 1 and mine:
            self.recording.asked(answers.numbers, what)
        return answers

    def counters(self) -> Counters:
        return Counters(torch.device("cpu"))


class _WatchedGroup(RecordedGroup):
    def __init__(self, recording: Recording, membership: Membership) -> None:
        super().__init__(recording, membership, sums=True)
        self._recording = recording

    def all_gather(self, out: Tensor, piece: Tensor) -> None:
        super().all_gather(out, piece)
        self._recording.sent(self.membership, "all_gather", piece.nbytes)

    def exchange(self, source: Tensor) -> list[Tensor]:
        parts = super().exchange(source)
        self._recording.sent(self.membership, "reduce_scatter", parts[0].nbytes)
        return parts

    def swap(self, leaving: Messages, arriving: Messages) -> None:
        super().swap(leaving, arriving)
        self._recording.sent(self.membership, "swap", sum(message.nbytes for message in leaving[0]))
