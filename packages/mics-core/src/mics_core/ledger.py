"""What moved: bytes and calls on every rung, and the bytes that copies and arithmetic moved in memory.

Counted where it happens. `predict` says what the formula expects, so that a test, or a user who wonders where the time
went, can put the two side by side.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock

import torch

from mics_core.sharding import Precision, Sharding
from mics_core.standstill import Standstill
from mics_core.topology import Rungs

CAPTION = (
    "Sent by this rank since reset(); rung 2-4: from 2 pieces to 4; predicted(micro_steps): what a step should send."
)


@dataclass
class Traffic:
    """So many calls, and so many bytes that this rank sent in them."""

    calls: int = 0
    bytes: int = 0


class Tally:
    """The counters of one model on one rank."""

    def __init__(self, device: torch.device) -> None:
        self.standstill = Standstill(device)
        self.links: dict[tuple[str, str], Traffic] = defaultdict(Traffic)
        self.memory: dict[str, int] = defaultdict(int)
        self._lock = Lock()  # lanes count, too

    def sent(self, action: str, rung: str, count: int) -> None:
        """A call of `action` on a rung, in which this rank sent so many bytes."""
        with self._lock:
            traffic = self.links[action, rung]
            traffic.calls += 1
            traffic.bytes += count

    def moved(self, operation: str, count: int) -> None:
        """So many bytes read and written by an operation on local memory."""
        with self._lock:
            self.memory[operation] += count

    def added(self, target: torch.Tensor, parts: Sequence[torch.Tensor], *, overwrite: bool) -> None:
        """The sum of the parts was added to, or written to, `target`."""
        self.moved("accumulate", parts[0].nbytes + target.nbytes * (1 if overwrite else 2))
        if len(parts) > 1:
            self.moved("reduction", sum(part.nbytes for part in parts[1:]))

    def reduced(self, target: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        """Parts were summed on their way, which NCCL does inside its reduce-scatter."""
        self.moved("reduction", target.nbytes + sum(part.nbytes for part in parts))


@dataclass(frozen=True)
class UnitSize:
    """Elements of a unit's flat buffers, padding included."""

    trained: int
    frozen: int


@dataclass(frozen=True)
class Formula:
    """What must move, from the sharding alone, for a model whose units are used one after another in one order."""

    sharding: Sharding
    precision: Precision
    rungs: Rungs
    root: UnitSize
    units: tuple[UnitSize, ...]  # without the root, in the order of use

    def step(self, micro_steps: int, *, marked: bool = True) -> dict[tuple[str, str], Traffic]:
        """What one rank sends in one optimizer step; `marked` if the micro-steps came from `accumulate`.

        From the second pass on: the first one does not know the order yet, and keeps nothing for its next use.
        """
        p, g, o, world = (
            self.sharding.params,
            self.sharding.grads,
            self.sharding.optimizer,
            self.rungs.degrees[-1],
        )
        traffic: dict[tuple[str, str], Traffic] = defaultdict(Traffic)
        for unit, gathers in self._gathers(micro_steps, marked=marked):
            for size in (unit.trained, unit.frozen):
                self._add(traffic, "gather", size, 1, p, self.precision.compute, gathers)
            reduce = self.precision.reduce
            self._add(traffic, "hop 1", unit.trained, 1, g, reduce, micro_steps)
            self._add(traffic, "hop 2", unit.trained, g, world, reduce, 1)
            self._add(traffic, "sync", unit.trained, o, world, reduce, 1 if g < world else 0)
            self._add(traffic, "refresh", unit.trained, p, o, self.precision.compute, 1)
        return {key: value for key, value in traffic.items() if value.calls}

    def at_rest(self) -> dict[str, int]:
        """Bytes that one rank holds between steps, with the state of mics.AdamW."""
        compute, master = self.precision.compute, self.precision.master
        p, g, o = self.sharding.params, self.sharding.grads, self.sharding.optimizer
        trained = sum(unit.trained for unit in (self.root, *self.units))
        frozen = sum(unit.frozen for unit in (self.root, *self.units))
        return {
            "shard": (trained + frozen) // p * compute.itemsize,
            "master": 0 if master == compute else trained // o * master.itemsize,
            "sharded": trained // g * master.itemsize,
            "optimizer": 2 * trained // o * 4,
        }

    def gathered(self) -> int:
        """Bytes of whole units that one rank holds at most with the default budget: the root, one in use, one ahead."""
        if self.sharding.params == 1:
            return 0
        units = [(unit.trained + unit.frozen) * self.precision.compute.itemsize for unit in (self.root, *self.units)]
        return units[0] + max(units[1:], default=0) + max(units)

    def working(self) -> dict[str, int]:
        """Bytes that one rank keeps for gradients on their way, once there were several micro-steps.

        What arrives is summed out of place on CPUs only: NCCL does that itself.
        """
        reduce = self.precision.reduce.itemsize
        g, world = self.sharding.grads, self.rungs.degrees[-1]
        largest = max(unit.trained for unit in (self.root, *self.units))
        wires = len(self.rungs.stages(g, world)) if self.precision.reduce != self.precision.master and g < world else 0
        return {
            "staging": 2 * largest * (reduce if g > 1 else self.precision.compute.itemsize),
            "wire": wires * (largest // g) * reduce,
            "received": sum(
                (above // below - 1) * (largest // above) * reduce for below, above in pairwise(self.rungs.degrees)
            ),
        }

    def _gathers(self, micro_steps: int, *, marked: bool) -> Iterable[tuple[UnitSize, int]]:
        """How often each unit is gathered: for forward and backward, unless it is kept because it comes next.

        The last unit of a forward begins the backward; the first one ends it, and begins the next micro-step. The root
        is around both.
        """
        passes_kept = micro_steps - 1 if marked else 0
        yield self.root, micro_steps - passes_kept
        last = len(self.units) - 1
        for number, unit in enumerate(self.units):
            kept = (micro_steps if number == last else 0) + (passes_kept if number == 0 else 0)
            yield unit, 2 * micro_steps - kept

    def _add(
        self,
        traffic: dict[tuple[str, str], Traffic],
        action: str,
        size: int,
        low: int,
        high: int,
        dtype: torch.dtype,
        times: int,
    ) -> None:
        for step in self.rungs.steps(low, high) if size else ():
            below, above = self.rungs.degrees[step : step + 2]
            entry = traffic[action, self.rungs.name(step)]
            entry.calls += times
            entry.bytes += times * (above // below - 1) * (size // above) * dtype.itemsize


@dataclass(frozen=True)
class Ledger:
    """What one rank sent and moved since `reset`, and what the formula expects of a step."""

    tally: Tally
    formula: Formula
    exposed: float
    """Seconds that the computation stood still for transfers; on a GPU since the first `reset`."""

    @property
    def counted(self) -> dict[tuple[str, str], Traffic]:
        """Calls and bytes sent, by action and rung."""
        return dict(self.tally.links)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes read and written in local memory, by operation. Sums of what peers sent are under "reduction"."""
        return dict(self.tally.memory)

    def predicted(self, micro_steps: int, *, marked: bool = True) -> dict[tuple[str, str], Traffic]:
        """What one optimizer step should send, in the same form as `counted`."""
        return self.formula.step(micro_steps, marked=marked)

    def reset(self) -> None:
        """Count from zero."""
        self.tally.links.clear()
        self.tally.memory.clear()
        self.tally.standstill.reset()

    def __str__(self) -> str:
        rows = [("action", "rung", "calls", "bytes sent")]
        rows += [(a, rung, str(t.calls), f"{t.bytes:,}") for (a, rung), t in sorted(self.counted.items())]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join([CAPTION, *lines])
