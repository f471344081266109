"""What a run leaves to be read by programs: a line of JSON and TensorBoard's scalars for each report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from mics_models.data.replacing import replacing
from mics_models.training.board import Board

LOG = "log.jsonl"


class Journal:
    """The log of a run in its folder; a resumed run goes on where its checkpoint was, and drops what came after."""

    def __init__(self, folder: Path, *, first: int, tensorboard: bool) -> None:
        kept = [row for row in read(folder) if row["step"] <= first]
        with replacing(folder / LOG) as file:
            file.write("".join(_line(row) for row in kept).encode())
        self._path = folder / LOG
        self._board = Board(folder / "tensorboard", first=first + 1) if tensorboard else None

    def write(self, row: Mapping[str, float]) -> None:
        """A report; `row["step"]` is the number of steps done."""
        with self._path.open("a") as file:
            file.write(_line(row))
        if self._board is not None:
            self._board.write(row["step"], {name: value for name, value in row.items() if name != "step"})

    def close(self) -> None:
        """Write out what is left."""
        if self._board is not None:
            self._board.close()


def _line(row: Mapping[str, float | None]) -> str:
    """JSON has no word for what is not finite, such as the norm of a step that float16 skips."""
    numbers = {name: value if value is None or math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(numbers, allow_nan=False) + "\n"


def read(folder: Path) -> list[dict[str, float]]:
    """The reports of a run so far. A last line that a kill cut short is left out."""
    path = folder / LOG
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}), expected JSON in each line: remove the line") from error
