"""The picture at the end of a run: its losses, and its speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure


def draw(rows: Sequence[dict[str, float]], title: str, path: Path) -> None:
    """Draw the reports of a run as a PNG."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    losses, speeds = figure.subplots(1, 2)
    figure.suptitle(title)
    for name, marker in (("loss", ""), ("held_out", "o")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            losses.plot(*zip(*points, strict=True), marker=marker, label=name.replace("_", " "))
    losses.set(xlabel="step", ylabel="nats per token")
    losses.legend()
    speeds.plot([row["step"] for row in rows], [row["tokens_per_second"] for row in rows])
    speeds.set(xlabel="step", ylabel="tokens per second", ylim=(0, None))
    figure.savefig(path, dpi=120)
