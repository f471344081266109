"""What records of scenes say, as Markdown: a table of one, the weak scaling over several, and the goals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.harness import Ratio, quantile
from bench.record import at, table
from bench.scenes.table import Scene

Found = Mapping[str, Any]
"""The record of a scene."""

WEAK = ("weak-1", "weak-2", "weak-8")

WEAK_HISTORY = (
    "The waits of the scene of weak scaling were set three times, after its figures were seen: it kept 0.950, then "
    "0.964, then 0.983 from 2 to 8 nodes (docs/log.md, 2026-11-21)."
)
"""What a reader should know of its goal."""

LEAN = "mics 2,2,4"
"""Of ours, what stands beside DDP where memory is told."""

REAL_RATE, REAL_FLOPS = 400e9, 170e12
"""Of a real node's link in bit/s, and of each of its GPUs in a second: what the published figures of MiCS were like."""


def scene_table(found: Found) -> str:
    """A scene's figures, for each number of micro-steps."""
    first = next(iter(found["cases"][0]["variants"]))
    header = [
        "micro-steps",
        "",
        "s per step",
        f"times as fast as {first}",
        "over the limit",
        "MB from a node",
        "MB held",
    ]
    rows = []
    for case in found["cases"]:
        for name, figures in case["variants"].items():
            over = over_limit(figures)
            rows.append(
                [
                    str(case["micro_steps"]),
                    name,
                    _with_ends(figures),
                    Ratio(**figures["times_as_fast"]).told(),
                    "" if over is None else f"{over:.2f}",
                    f"{figures['sent'][-1] / 1e6:.1f}",
                    f"{figures['held'] / 1e6:.2f}",
                ]
            )
    return table(header, rows)


def _with_ends(figures: Mapping[str, Any]) -> str:
    """The median step, and the least and the most of all rounds."""
    least, most = ends(figures)
    return f"{figures['spread']['median']:.3f} ({least:.3f}-{most:.3f})"


def ends(figures: Mapping[str, Any]) -> tuple[float, float]:
    """The shortest and the longest step."""
    return min(figures["seconds"]), max(figures["seconds"])


def peers_note(found: Found) -> str:
    """What to know of the peers beside their figures."""
    held = {name: f"{figures['held'] / 1e6:.1f} MB" for name, figures in found["cases"][0]["variants"].items()}
    return (
        f"DDP keeps everything on every rank, {held['DDP']} where {LEAN} holds {held[LEAN]}, so it cannot hold the "
        "models that this is for: it shows what the wire allows where memory is no limit. FSDP2, HSDP and ZeRO-3 pay "
        "here what they would not on GPUs: gloo's reduce-scatter moves twice the bytes of NCCL's, and the thread that "
        "computes waits for it."
    )


def over_limit(figures: Mapping[str, Any]) -> float | None:
    """The median step over the shortest that could be; None for a peer."""
    if figures["expected"] is None or not figures["expected"]["limit"]:
        return None
    over: float = figures["spread"]["median"] / figures["expected"]["limit"]
    return over


def _case(found: Found, name: str, micro_steps: int | None) -> Mapping[str, Any] | None:
    """The figures of a variant, with any number of micro-steps if None is told; None if it was left out."""
    for case in found["cases"]:
        if micro_steps in (None, case["micro_steps"]) and name in case["variants"]:
            figures: Mapping[str, Any] = case["variants"][name]
            return figures
    return None


def seconds(found: Found, name: str, micro_steps: int | None = None) -> float | None:
    """The median step of a variant; None if it was left out."""
    figures = _case(found, name, micro_steps)
    return None if figures is None else figures["spread"]["median"]


def _limit(found: Found, name: str) -> float | None:
    figures = _case(found, name, None)
    return None if figures is None or figures["expected"] is None else figures["expected"]["limit"]


def weak_table(records: Mapping[str, Found]) -> str:
    """Seconds of a step on more and more nodes; of the speed on 2 nodes, what 8 keep and what the limit would."""
    nodes = [records[scene]["scene"]["nodes"] for scene in WEAK]
    header = ["s per step", *[f"{count} nodes" if count > 1 else "1 node" for count in nodes]]
    header += ["kept from 2 to 8", "of the limit", "cores busy with 8"]
    two, eight = (records[scene] for scene in WEAK[1:])
    rows = []
    for name, last in eight["cases"][0]["variants"].items():
        steps = [_case(records[scene], name, None) for scene in WEAK]
        kept = [_divided(of(two, name), of(eight, name)) for of in (seconds, _limit)]
        told = ["" if step is None else _with_ends(step) for step in steps]
        told += ["" if share is None else f"{share:.3f}" for share in kept]
        rows.append([name, *told, f"{quantile(last['busy'], 0.5):.0%}"])
    return table(header, rows)


def weak_note(records: Mapping[str, Found]) -> str:
    """What the proportion of bytes to stand-in stands for."""
    scene = Scene.read(json.dumps(records[WEAK[-1]]["scene"]))
    gather = 4 * scene.parameters * 8 / (scene.rate_mbit * 1e6)
    compute = scene.blocks * (scene.stand_in.forward + scene.stand_in.backward)
    # 2 bytes and 6 FLOPs a token for each parameter: their number does not matter.
    tokens = REAL_FLOPS * 2 * 8 / (REAL_RATE * 6 * gather / compute)
    return (
        f"A node's link needs {gather / compute:.3f} of a micro-step's {compute:g} s for all parameters once, as it "
        f"does for bfloat16 at {REAL_RATE / 1e9:g} Gbit/s with {tokens:,.0f} tokens a GPU and micro-step at "
        f"{REAL_FLOPS / 1e12:g} TFLOP/s, whatever the model's size."
    )


@dataclass(frozen=True)
class Goal:
    """A bound that a figure of some scenes should keep."""

    what: str
    scenes: tuple[str, ...]
    figure: Callable[[Mapping[str, Found]], float | None]
    bound: float
    at_most: bool = False

    def kept(self, value: float) -> bool:
        """Whether this figure keeps it."""
        return value <= self.bound if self.at_most else value >= self.bound


def faster(scene: str, name: str, base: str, bound: float, micro_steps: int = 4) -> Goal:
    """A variant should take so many times less than another."""
    return Goal(
        f"{name}, times as fast as {base} ({scene}, {micro_steps} micro-steps)",
        (scene,),
        lambda records: _divided(
            seconds(records[scene], base, micro_steps), seconds(records[scene], name, micro_steps)
        ),
        bound,
    )


def near(name: str) -> Goal:
    """A variant should take hardly longer than it must."""

    def figure(records: Mapping[str, Found]) -> float | None:
        (case,) = records["stand-in"]["cases"]
        return over_limit(case["variants"][name])

    return Goal(f"{name}, step over the limit (stand-in)", ("stand-in",), figure, 1.15, at_most=True)


def fewer(exact: str, bound: float) -> Goal:
    """Eight bits should leave a node in so many of the bytes, as the wire counts them."""

    def figure(records: Mapping[str, Found]) -> float | None:
        (case,) = records["eight-bits"]["cases"]
        few, many = (case["variants"][name]["sent"][-1] for name in (f"{exact} int8", exact))
        return float(few / many)

    return Goal(
        f"{exact} int8, bytes from a node over those without (eight-bits)", ("eight-bits",), figure, bound, True
    )


def keeps(name: str, scenes: tuple[str, str], bound: float) -> Goal:
    """A variant should be as fast on many nodes as on few."""
    few, many = scenes
    return Goal(
        f"{name}, weak scaling from 2 to 8 nodes ({few}, {many})",
        scenes,
        lambda records: _divided(seconds(records[few], name), seconds(records[many], name)),
        bound,
    )


GOALS = (
    *[near(f"mics {degrees}") for degrees in ("2,2,4", "4,4,4", "2,2,8", "2,2,2", "1,1,1")],
    faster("peers-large", "mics 2,2,4", "HSDP 4", 6.0),
    faster("peers-large", "mics 4,4,4", "HSDP 4", 1.8),
    *[
        faster(scene, "mics 2,2,8", base, 8.0, micro_steps)
        for base in ("FSDP2 full", "ZeRO-3")
        for scene, micro_steps in (("peers-large", 4), ("peers-100", 8))
    ],
    faster("peers-100", "mics 2,2,2", "HSDP 2", 1.0, 8),
    faster("peers-large", "mics 1,1,1", "DDP", 1.0),
    Goal(
        "mics 2,2,-1, weak scaling from 2 to 8 nodes",
        WEAK,
        lambda records: _divided(seconds(records["weak-2"], "mics 2,2,-1"), seconds(records["weak-8"], "mics 2,2,-1")),
        0.98,
    ),
    faster("hierarchy", "mics 4,4,4", "mics 4,4,4 flat", 1.45),
    fewer("mics 2,2,8", 0.52),
    fewer("mics 2,2,8 fp32-sums", 0.35),
    fewer("mics 2,2,8 fp32", 0.64),
    faster("eight-bits", "mics 2,2,8 int8", "HSDP 4", 12.0),
    faster("eight-bits", "mics 2,2,8 int8", "HSDP 2", 1.8),
    keeps("mics 2,2,-1 int8", ("weak-bf16-2", "weak-bf16-8"), 0.98),
)


def goals_table(records: Mapping[str, Found]) -> str:
    """Each goal beside what was measured."""
    rows = [
        [goal.what, f"{'<=' if goal.at_most else '>='} {goal.bound:g}", figure, kept, _commits(goal, records)]
        for goal, figure, kept in _judged(records)
    ]
    return table(["", "goal", "measured", "", "commit"], rows)


def _commits(goal: Goal, records: Mapping[str, Found]) -> str:
    found = [records[scene] for scene in goal.scenes if scene in records]
    return ", ".join(dict.fromkeys(at(record) for record in found))


def _judged(records: Mapping[str, Found]) -> Iterator[tuple[Goal, str, str]]:
    for goal in GOALS:
        value = goal.figure(records) if all(scene in records for scene in goal.scenes) else None
        if value is None:
            yield goal, "not measured", ""
        else:
            yield goal, f"{value:.2f}", "kept" if goal.kept(value) else "missed"


def _divided(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other
