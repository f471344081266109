"""Checkpoints against the disk: save and load beside plain writes and reads of as many bytes, and what a background
save costs the steps.

    python -m bench.checkpoints [--megabytes 200 --ranks 1 2]

Every rank writes its share to one file: plainly, and as a checkpoint. Both are files that were not there, and end with
the bytes and their names on the disk (fsync). Reads are cold, of files whose pages the system was told to drop
(posix_fadvise), and warm, of files just read. A plain read brings bytes to where a load does, weights to memory that is
there and moments to memory that is new, and checks nothing: so there are loads without checksums, too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import ranks, record
from bench.harness import Ratio, Samples

PEERS = {
    "save": "plain write",
    "load, cold": "plain read, cold",
    "load, warm": "plain read, warm",
    "load without checksums, cold": "plain read, cold",
    "load without checksums, warm": "plain read, warm",
}
"""What each is compared with."""


def judged(found: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Speeds, shares of the plain ones, and the cost of a background save."""
    samples = Samples(found["seconds"])
    size, steps = found["bytes"], Samples(found["background"]["seconds"])
    actions = {
        name: {
            "seconds": samples.spread(name),
            "gb_per_s": size / samples.spread(name).median / 1e9,
            # Over the plain one's speed, not its time.
            "share": samples.ratio(PEERS[name], name) if name in PEERS else None,
        }
        for name in found["seconds"]
    }
    background = {name: steps.spread(name) for name in steps.seconds} | {
        "bytes": found["background"]["bytes"],
        "ratio": steps.ratio("with", "without"),
    }
    return {"ranks": count, "bytes": size, "actions": actions, "background": background}


def checkpoints_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """As Markdown, from a record."""
    texts = []
    for row in rows:
        for name, each in row["actions"].items():
            told = Ratio(**each["share"]).told() if each["share"] else ""
            texts.append([str(row["ranks"]), name, f"{each['gb_per_s']:.2f}", told])
    return record.table(["ranks", "", "GB/s", "of the plain one"], texts)


def checkpoints_note(rows: Sequence[Mapping[str, Any]]) -> str:
    """How much was written, and what a background save costs."""
    said = [f"{rows[0]['bytes'] / 1e6:,.0f} MB of weights and optimizer state."]
    for row in rows:
        steps = row["background"]
        without = steps["without"]["median"]
        said.append(
            f"Ten steps on {row['ranks']} {'rank' if row['ranks'] == 1 else 'ranks'}, with a background save of "
            f"{steps['bytes'] / 1e6:,.0f} MB in the first, take {Ratio(**steps['ratio']).told(3)} of {without:.2f} s "
            f"without, medians of {steps['with']['rounds']} rounds; the save goes on for "
            f"{steps['beyond']['median']:.2f} s after them."
        )
    return " ".join(said)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoints", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=200.0, help="of weights and optimizer state, of all ranks")
    parser.add_argument("--rounds", type=int, default=3, help="of writing and reading")
    parser.add_argument("--steps-megabytes", type=float, default=100.0, help="likewise, of the model that trains")
    parser.add_argument("--steps-rounds", type=int, default=7, help="of ten steps with a background save and without")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: where temporary files are")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "cpu" / "checkpoints.json")
    options = parser.parse_args(arguments)
    words = ["python", "-m", "bench.checkpoints", *(sys.argv[1:] if arguments is None else arguments)]
    content = record.stamp(words, "cpu")
    told = map(str, (options.megabytes, options.rounds, options.steps_megabytes, options.steps_rounds))
    rows = []
    with tempfile.TemporaryDirectory(prefix="mics-checkpoints-", dir=options.folder) as folder:
        module = ["bench.checkpoints_work", folder, *told]
        for count in options.ranks:
            print(f"checkpoints: {options.megabytes:g} MB from {count} ranks", file=sys.stderr, flush=True)
            rows.append(record.plain(judged(ranks.run(count, module, timeout=1200), count)))
    print(f"{checkpoints_table(rows)}\n\n{checkpoints_note(rows)}")
    print(f"saved {record.save(options.out, content | {'rows': rows})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
