"""Curves over nodes as a PNG: what fits in colour, what does not fit in grey."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from pathlib import Path
from textwrap import fill
from typing import Any

from mics_core.planner.candidate import System
from mics_core.planner.columns import digits, gigabytes
from mics_core.planner.scaling import Point
from mics_core.planner.timeline import new_figure

_LOOKS = {  # colour, line, marker and its size: of curves that cover each other all markers are seen
    System.MICS: ("#1b6ca8", "-", "o", 5),
    System.ZERO3: ("#d1495b", "--", "s", 8),
    System.HSDP: ("#c98500", "-.", "^", 11),
    System.FSDP2: ("#8f5fa8", "--", "v", 8),
    System.DDP: ("#3b7d4f", ":", "D", 14),
}
_GREY = "#b8bec5"


def draw(points: Sequence[Point], path: Path | str, title: str = "") -> None:
    """Draw how fast each system is, with what was played and whether it fits in the legend; needs matplotlib."""
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    for system in dict.fromkeys(point.system for point in points):
        mine = [point for point in points if point.system is system]
        colour, line, marker, size = _LOOKS[system]
        shape: dict[str, Any] = {"marker": marker, "markersize": size, "markerfacecolor": "none", "linestyle": line}
        ranks = [point.ranks for point in mine]
        axes.plot(ranks, [point.prediction.tflops for point in mine], color=_GREY, zorder=1, **shape)
        fitting = [point.prediction.tflops if point.fits else nan for point in mine]
        anywhere = any(point.fits for point in mine)
        axes.plot(ranks, fitting, color=colour if anywhere else _GREY, label=label(mine), **shape)
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    ticks = {point.ranks: point.nodes for point in points}
    axes.set_xticks(list(ticks), [f"{ranks}\n{nodes} nodes" for ranks, nodes in ticks.items()])
    axes.set_ylim(0, 1.1 * max(point.prediction.tflops for point in points))
    axes.set_xlabel("ranks")
    axes.set_ylabel("TFLOP/s of the model, a rank")
    axes.spines[["top", "right"]].set_visible(False)
    lines = [*title.splitlines(), "predicted, not measured; grey: does not fit"]
    axes.set_title("\n".join(fill(line, 80) for line in lines), fontsize=10, loc="left")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    figure.savefig(path, dpi=150, format="png")


def label(points: Sequence[Point]) -> str:
    """A system's name, its degrees (W stands for all ranks, however many) and where it does not fit."""
    cuts = [(point.sharding.params, point.sharding.grads, point.sharding.optimizer) for point in points]
    named = []
    for each in zip(*cuts, strict=True):
        whole = all(degree == point.ranks for degree, point in zip(each, points, strict=True))
        named.append("W" if whole and len(set(each)) > 1 else digits(each[0]) if len(set(each)) == 1 else "varied")
    lacking = [point for point in points if not point.fits]
    said = f"{points[0].system.value} ({', '.join(named)})"
    if not lacking:
        return said
    where = "" if len(lacking) == len(points) else f" on {', '.join(str(point.nodes) for point in lacking)} nodes"
    needed = max(point.memory for point in lacking)
    return f"{said}\ndoes not fit{where}:\n{gigabytes(needed)} of {gigabytes(points[0].available)} GB"
