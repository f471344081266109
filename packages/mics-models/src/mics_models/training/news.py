"""What ranks tell each other after every step, read a step later, so that nobody waits for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.distributed as dist

from mics_core.comm.world import hearing


class Stop(IntEnum):
    """Why a rank wants the run to end after this step."""

    NO = 0
    TIME = 1  # the minutes are over
    SIGNAL = 2
    TROUBLE = 3  # something is wrong on a rank, which ends the run without a save


@dataclass(frozen=True)
class News:
    """What all ranks know of a step."""

    loss: float  # the mean over ranks and micro-steps
    bad: tuple[tuple[int, int], ...]  # the micro-step and rank of each loss that is not finite
    norm: float  # of the gradient
    stop: Stop  # the strongest reason of any rank


class Exchange:
    """Sends one step's news, and gives it out when it is asked for."""

    def __init__(self, device: torch.device) -> None:
        # Beside the computation: a copy to the host on its stream would end behind the next step.
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._rows: torch.Tensor | None = None
        self._work: dist.Work | None = None

    def send(self, losses: torch.Tensor, norm: torch.Tensor, stop: Stop) -> None:
        """Tell this rank's losses, one for each micro-step, the gradient's norm, and whether to leave."""
        reason = torch.full((1,), float(stop), device=losses.device)
        mine = torch.cat([losses.float(), norm.view(1).float(), reason])
        self._rows, self._work = mine.view(1, -1), None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._rows = mine.new_empty(dist.get_world_size(), len(mine))
            self._work = dist.all_gather(list(self._rows.unbind()), mine, async_op=True)
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                if self._work is not None:
                    self._work.wait()
                    self._work = None
                    mine.record_stream(self._side)  # the collective holds it no longer, and may not have read it yet
                self._rows.record_stream(self._side)
                self._rows = self._rows.to("cpu", non_blocking=True)

    def read(self) -> News | None:
        """The news sent last; None if there is none, or it was read."""
        if self._rows is None:
            return None
        if self._work is not None:
            with hearing("the losses of a step", None, range(len(self._rows))):
                self._work.wait()
        if self._side is not None:
            self._side.synchronize()
        rows: list[list[float]] = self._rows.tolist()
        self._rows = None
        losses = [row[:-2] for row in rows]
        bad = tuple(
            (micro_step, rank)
            for rank, row in enumerate(losses)
            for micro_step, loss in enumerate(row)
            if not math.isfinite(loss)
        )
        mean = sum(sum(row) / len(row) for row in losses) / len(losses)
        norm = next((row[-2] for row in rows if not math.isfinite(row[-2])), rows[0][-2])  # all have the same
        return News(mean, bad, norm, Stop(int(max(row[-1] for row in rows))))
