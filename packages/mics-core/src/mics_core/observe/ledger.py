"""What moved: bytes and calls on every level, bytes in memory, and beside them what the formula expects of a step."""

from __future__ import annotations

from dataclasses import dataclass

from mics_core.comm.counters import Counters
from mics_core.spec.formula import Formula, Traffic

CAPTION = (
    "Sent by this rank since reset(); level 2-4: from 2 pieces to 4; predicted(micro_steps): what a step should send."
)


@dataclass(frozen=True)
class Ledger:
    """What one rank sent and moved since `reset`, and what the formula expects of a step."""

    counters: Counters
    formula: Formula
    exposed: float
    """Seconds that the computation stood still for transfers; on a GPU since the first `reset`."""

    @property
    def counted(self) -> dict[tuple[str, str], Traffic]:
        """Calls and bytes sent, by action and level."""
        return dict(self.counters.links)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes read and written in local memory, by operation. Sums of what peers sent are under "reduction"."""
        return dict(self.counters.memory)

    def predicted(self, micro_steps: int, *, marked: bool = True) -> dict[tuple[str, str], Traffic]:
        """What one optimizer step should send, in the same form as `counted`."""
        return self.formula.step(micro_steps, marked=marked)

    def reset(self) -> None:
        """Count from zero."""
        self.counters.reset()

    def __str__(self) -> str:
        rows = [("action", "level", "calls", "bytes sent")]
        rows += [(a, level, str(t.calls), f"{t.bytes:,}") for (a, level), t in sorted(self.counted.items())]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join([CAPTION, *lines])
