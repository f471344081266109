"""TensorBoard's file of a run's numbers.

torch's SummaryWriter writes in a thread, which answers a full disk with a traceback of its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Board:
    """A file of events. After each write it is whole, or OSError is raised."""

    def __init__(self, folder: Path, *, first: int) -> None:
        """Show nothing of the run's earlier files from the step `first` on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        self._event: Any = Event
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        self._records: Any = RecordWriter((folder / f"events.out.tfevents.{time.time():.6f}.mics").open("wb"))
        self._add(step=first, file_version="brain.Event:2")
        self._add(step=first, session_log=SessionLog(status=SessionLog.START))
        self._records.flush()

    def write(self, step: float, numbers: Mapping[str, float]) -> None:
        """Numbers after so many steps."""
        values = [{"tag": name, "simple_value": value} for name, value in numbers.items()]
        self._add(step=int(step), summary={"value": values})
        self._records.flush()

    def close(self) -> None:
        """Nothing is left to be written."""
        self._records.close()

    def _add(self, **what: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **what).SerializeToString())
