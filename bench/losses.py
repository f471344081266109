"""What eight bits between nodes do to a loss: trainings alike but for them, several seeds of each.

    python -m bench.losses [--models byte-tiny bert-tiny --precisions bf16 fp16 --steps 2000 --seeds 3]

A GPT and a BERT learn the embedded corpus on 4 nodes of one rank, Sharding(1, 1, 4): sums of gradients and new weights
cross nodes in every step. "hop 2" has the sums alone in int8, "refresh" the weights' differences, "both" both. A seed
decides weights and batches, so its trainings differ by rounding alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench import ranks, record
from bench.losses_work import EVERY, SMALL, VARIANTS

RANKS = 4
SHARE = 1 / 3
"""Of the spread between seeds, that eight bits may move the mean by."""

Found = Mapping[str, Any]


def row(model: str, precision: str, runs: Sequence[Found]) -> dict[str, Any]:
    """Of one model in one precision: losses at the end by variant and seed, and what eight bits moved."""
    ends = {name: [run["held_out"][-1] for run in runs if run["variant"] == name] for name in VARIANTS}
    exact = ends["exact"]
    return {
        "model": model,
        "precision": precision,
        "ends": ends,
        "spread": max(exact) - min(exact),
        "deviation": stdev(exact) if len(exact) > 1 else 0.0,
        "moved": {name: mean(ends[name]) - mean(exact) for name in VARIANTS[1:]},
        "curves": {name: [run["held_out"] for run in runs if run["variant"] == name] for name in VARIANTS},
    }


def losses_table(rows: Sequence[Found]) -> str:
    """As Markdown: the mean held-out loss of exact trainings, their spread, and by how much the others differ."""
    texts = [
        [
            each["model"],
            each["precision"],
            f"{mean(each['ends']['exact']):.4f}",
            f"{each['spread']:.4f}",
            *[f"{each['moved'][name]:+.4f}" for name in VARIANTS[1:]],
            "yes" if all(abs(moved) <= SHARE * each["spread"] for moved in each["moved"].values()) else "no",
        ]
        for each in rows
    ]
    head = ["model", "precision", "exact", "spread of seeds", *VARIANTS[1:], "within a third"]
    return record.table(head, texts)


def draw(path: Path, rows: Sequence[Found]) -> None:
    """The curves, a picture for each model and precision: seeds of a variant in one colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(rows), figsize=(4 * len(rows), 3.2), squeeze=False, layout="constrained")
    for axis, each in zip(axes[0], rows, strict=True):
        for number, (name, curves) in enumerate(each["curves"].items()):
            for turn, curve in enumerate(curves):
                steps = [EVERY * (place + 1) for place in range(len(curve))]
                axis.plot(steps, curve, color=f"C{number}", linewidth=0.9, label=None if turn else name)
        axis.set_title(f"{each['model']}, {each['precision']}", fontsize=9)
        axis.set_xlabel("steps")
        axis.set_ylabel("held-out loss, nats a token")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print and save."""
    parser = argparse.ArgumentParser(prog="python -m bench.losses", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(SMALL), default=list(SMALL))
    parser.add_argument("--precisions", nargs="+", choices=["bf16", "fp16", "fp32"], default=["bf16", "fp16"])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "cpu" / "losses.json")
    options = parser.parse_args(arguments)
    words = ["python", "-m", "bench.losses", *(sys.argv[1:] if arguments is None else arguments)]
    content = record.stamp(words, "cpu") | {"steps": options.steps, "ranks": RANKS}
    rows = []
    for precision in options.precisions:
        for model in options.models:
            job = ["bench.losses_work", model, precision, str(options.seeds), str(options.steps)]
            rows.append(row(model, precision, ranks.run(RANKS, job, timeout=60 + options.steps * options.seeds * 2)))
            print(losses_table(rows), flush=True)
            record.save(options.out, content | {"rows": rows})
            draw(options.out.with_suffix(".png"), rows)
    print(f"saved {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
