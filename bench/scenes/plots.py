"""Pictures of records: bars of a scene's steps, and lines of weak scaling. Without pyplot, which keeps figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.scenes.figures import WEAK, Found, seconds

OURS, PEER, LIMIT = "#1b6ca8", "#9aa5b1", "#d1495b"


def bars(found: Found, path: Path) -> None:
    """Seconds of a step of every variant, ours with its limit as a mark; of several numbers of micro-steps, 4."""
    cases = found["cases"]
    case = next((each for each in cases if each["micro_steps"] == 4), cases[-1])
    names = list(case["variants"])
    medians = [figures["spread"]["median"] for figures in case["variants"].values()]
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(names, medians, color=[OURS if name.startswith("mics") else PEER for name in names])
    for place, (median, figures) in enumerate(zip(medians, case["variants"].values(), strict=True)):
        axes.text(median, place, f" {median:.2f}", va="center", fontsize=8)
        if figures["expected"]:
            limit = figures["expected"]["limit"]
            axes.plot([limit, limit], [place - 0.4, place + 0.4], color=LIMIT, label="limit")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    scene = found["scene"]
    axes.set_xlabel(
        f"s per step, {case['micro_steps']} micro-steps, {scene['nodes']} nodes, {scene['rate_mbit']:g} Mbit/s"
    )
    axes.set_title(scene["question"], fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    _legend_once(axes)
    figure.savefig(path, dpi=110)


def weak(records: Mapping[str, Found], path: Path) -> None:
    """How much of its speed on 2 nodes each variant keeps on more."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    scenes = WEAK[1:]
    nodes = [records[scene]["scene"]["nodes"] for scene in scenes]
    for name in records[WEAK[-1]]["cases"][0]["variants"]:
        steps = [seconds(records[scene], name) for scene in scenes]
        if steps[0] is not None and None not in steps:
            kept = [steps[0] / step for step in steps if step]
            axes.plot(nodes, kept, marker="o", label=name, color=OURS if name.startswith("mics") else None)
    axes.set_xticks(nodes, [str(count) for count in nodes])
    axes.set_ylim(0, 1.1)
    axes.set_xlabel("nodes of 2 ranks, the same work on each")
    axes.set_ylabel("speed kept of that on 2 nodes")
    axes.set_title("Weak scaling, a timed wait in place of computation", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _legend_once(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles[:1], labels[:1], frameon=False, fontsize=8)
