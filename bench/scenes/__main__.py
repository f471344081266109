"""Run scenes, check that all variants agree on the loss, and write what was measured, with a picture.

python -m bench.scenes [NAMES...] [--small] [--out FOLDER]
python -m bench.scenes --draw                              # measures nothing: draws the pictures of the records there
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import record
from bench.cluster import Cluster, unavailable
from bench.harness import Samples
from bench.ranks import result
from bench.scenes import plots
from bench.scenes.figures import WEAK, scene_table
from bench.scenes.runtimes import DEEPSPEED_ON_CPUS, left_out
from bench.scenes.table import SCENES, Scene

RESULTS = record.RESULTS / "cluster"


def play(scene: Scene) -> dict[str, Any]:
    """Run one scene; RuntimeError if a rank fails, AssertionError if the variants disagree on the loss."""
    reasons = {name: reason for name in scene.variants if (reason := left_out(name))}
    scene = scene.without(set(reasons))
    env = DEEPSPEED_ON_CPUS if "ZeRO-3" in scene.variants else {}
    begun = time.monotonic()
    with Cluster(scene.nodes, scene.rate_mbit, scene.latency_ms) as cluster:
        words = ["-m", "bench.scenes.work", scene.write()]
        outputs = cluster.torchrun(words, scene.ranks_per_node, env, timeout=600 + 5 * scene.budget).outputs
        fidelity = cluster.fidelity()
    cases: list[dict[str, Any]] = result(outputs)
    for case in cases:
        check_losses(case["variants"], TOLERANCE[scene.precision])
        add_spreads(case["variants"])
    took = time.monotonic() - begun
    versions = {"deepspeed": version("deepspeed")} if "ZeRO-3" in scene.variants else {}
    told = {"scene": scene, "left_out": reasons, "versions": versions}
    return told | {"took": took, "switch": fidelity, "cases": cases}


TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
"""How far losses may differ, relatively: in mixed precision variants round in other places."""


def check_losses(variants: Mapping[str, Mapping[str, Any]], near: float = TOLERANCE["fp32"]) -> None:
    """Raise unless all variants had the same loss in every step: they would not do the same work."""
    for losses in zip(*(found["losses"] for found in variants.values()), strict=True):
        if not all(abs(loss - losses[0]) <= near * abs(losses[0]) for loss in losses):  # nor is a NaN alike
            told = dict(zip(variants, losses, strict=True))
            raise AssertionError(f"scene: the variants disagree on the loss, so none of their times counts: {told}")


def add_spreads(variants: Mapping[str, dict[str, Any]]) -> None:
    """Medians and quantiles of every variant, and how many times as fast as the first one it is."""
    samples = Samples({name: found["seconds"] for name, found in variants.items()})
    base = next(iter(variants))
    for name, found in variants.items():
        found |= {"spread": samples.spread(name), "times_as_fast": samples.ratio(base, name)}


def draw(names: Sequence[str], folder: Path) -> None:
    """The pictures of these scenes' records; the one of weak scaling once all of its scenes are there."""
    there = {name: folder / f"{name}.json" for name in [*names, *WEAK] if (folder / f"{name}.json").exists()}
    records = {name: record.load(path) for name, path in there.items()}
    for name in records.keys() - set(WEAK):  # a bar of each says nothing of scaling
        plots.bars(records[name], folder / f"{name}.png")
    if set(names) & set(WEAK) and records.keys() >= set(WEAK):
        plots.weak(records, folder / "weak.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, draw and save."""
    names = [scene.name for scene in SCENES]
    parser = argparse.ArgumentParser(prog="python -m bench.scenes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"default: all of {', '.join(names)}")
    parser.add_argument("--small", action="store_true", help="only to see that all runs: the figures say nothing")
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw the records that are there")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(names):
        parser.error(f"got {', '.join(sorted(unknown))}, expected some of {', '.join(names)}")
    if options.draw:
        draw(options.names or names, options.out)
        return 0
    if reason := unavailable():
        print(f"scenes: left out: {reason}")
        return 0
    chosen = [scene for scene in SCENES if scene.name in (options.names or names)]
    words = ["python", "-m", "bench.scenes", *(sys.argv[1:] if arguments is None else arguments)]
    for number, scene in enumerate(chosen, 1):
        print(f"scene {number} of {len(chosen)}, {scene.name}: about {scene.budget} s", file=sys.stderr, flush=True)
        stamp = record.stamp(words, "cpu")
        found = record.plain(stamp | play(scene.small() if options.small else scene))
        for name, reason in found["left_out"].items():
            print(f"left out: {name}: {reason}", file=sys.stderr)
        path = record.save(options.out / f"{scene.name}.json", found)
        draw([scene.name], options.out)
        print(f"\n{scene.question} ({scene.name})\n\n{scene_table(found)}\n\nsaved {path.name}", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
