"""Pictures of records: bars of a scene's steps, and lines of weak scaling. Without pyplot, which keeps figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.record import origin
from bench.scenes.figures import WEAK, Found, ends, seconds
from bench.scenes.table import SCENES

LOOKS = {
    "mics": ("#1b6ca8", "o", "-"),
    "FSDP2": ("#8f5fa8", "v", "--"),
    "ZeRO-3": ("#d1495b", "s", ":"),
    "HSDP": ("#c98500", "^", "-."),
    "DDP": ("#3b7d4f", "D", ":"),
}
"""Colour, marker and line by the first word of a variant's name: the colours of the simulator's curves."""

DARK = "#222222"
WIDTH, DPI = 7.0, 200


def bars(found: Found, path: Path) -> None:
    """Seconds of a step of every variant, the shortest first, ours with its limit; of several micro-steps, 4."""
    cases = found["cases"]
    case = next((each for each in cases if each["micro_steps"] == 4), cases[-1])
    variants = dict(sorted(case["variants"].items(), key=lambda each: float(each[1]["spread"]["median"])))
    medians = [figures["spread"]["median"] for figures in variants.values()]
    figure = Figure(figsize=(WIDTH, 1.6 + 0.3 * len(variants)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(list(variants), medians, color=[LOOKS[name.split()[0]][0] for name in variants])
    for place, (median, figures) in enumerate(zip(medians, variants.values(), strict=True)):
        least, most = ends(figures)
        axes.errorbar(median, place, xerr=[[median - least], [most - median]], color=DARK, capsize=2, lw=1)
        axes.text(most, place, f"  {median:.2f}", va="center", fontsize=8)
        if figures["expected"]:
            limit = figures["expected"]["limit"]
            axes.plot([limit] * 2, [place - 0.4, place + 0.4], color=DARK, lw=1.5, ls=":", label="limit")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    scene = found["scene"]
    axes.set_xlabel(
        f"s per step, {case['micro_steps']} micro-steps, {scene['nodes']} nodes, {scene['rate_mbit']:g} Mbit/s"
    )
    axes.set_title(_question(scene), fontsize=10)
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles[:1], ["the shortest step that the link allows"], frameon=False, fontsize=8)
    _finish(figure, axes, path, f"{origin(found)}; lines: the shortest and the longest step")


def weak(records: Mapping[str, Found], path: Path) -> None:
    """The speed of each variant on more and more nodes, against its own on 2."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.add_subplot()
    nodes = [records[scene]["scene"]["nodes"] for scene in WEAK]
    for name in records[WEAK[-1]]["cases"][0]["variants"]:
        base = seconds(records[WEAK[1]], name)
        found = [records[scene]["cases"][0]["variants"].get(name) for scene in WEAK]
        there = [(count, each) for count, each in zip(nodes, found, strict=True) if each]
        if base is None or not there:
            continue
        kept = [base / each["spread"]["median"] for _, each in there]
        least, most = zip(*[(base / ends(each)[1], base / ends(each)[0]) for _, each in there], strict=True)
        errors = [
            [k - low for k, low in zip(kept, least, strict=True)],
            [h - k for k, h in zip(kept, most, strict=True)],
        ]
        colour, marker, line = LOOKS[name.split()[0]]
        axes.errorbar(
            [count for count, _ in there], kept, errors, color=colour, marker=marker, ls=line, capsize=3, label=name
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(nodes, [str(count) for count in nodes])
    axes.set_xlabel("nodes of 2 ranks, the same work on each")
    axes.set_ylabel("speed, 1 is the variant's own on 2 nodes")
    axes.set_title("Weak scaling, a timed wait in place of computation (the axis does not begin at 0)", fontsize=10)
    axes.grid(axis="y", color="#e5e5e5")
    axes.legend(frameon=False, fontsize=8)
    told = [
        f"{count} node{'s' if count > 1 else ''}: {origin(records[name])}"
        for count, name in zip(nodes, WEAK, strict=True)
    ]
    _finish(figure, axes, path, "\n".join([*told, "lines: the fastest and the slowest step"]))


def _question(scene: Mapping[str, object]) -> str:
    """As the scene asks it now: a record may be older."""
    return next((each.question for each in SCENES if each.name == scene["name"]), str(scene["question"]))


def _finish(figure: Figure, axes: Axes, path: Path, below: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(below, fontsize=7, color="#666666", x=0.01, ha="left")
    figure.savefig(path, dpi=DPI)
