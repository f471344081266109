"""How much of a slow link the ladder's transfers use: descend, climb and sync between emulated nodes.

    python -m bench.links

The share of a link is the time that a node's bytes need at the link's rate, over the time that they took.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench import record
from bench.cluster import Cluster, unavailable

NODES, RANKS = 4, 2


def result(outputs: Sequence[str]) -> Any:
    """What rank 0 reported, among all that was printed."""
    (line,) = [line for text in outputs for line in text.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def run(rate: float, latency: float, megabytes: float) -> dict[str, float]:
    """The share of the link that each transfer reaches."""
    with Cluster(NODES, rate, latency) as cluster:
        work = str(Path(__file__).with_name("links_work.py"))
        found = result(cluster.torchrun([work, str(megabytes), str(RANKS)], RANKS, timeout=600).outputs)
    return {
        name: found["sent_by_node"][name] * 8 / (rate * 1e6) / median(seconds)
        for name, seconds in found["seconds"].items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(prog="python -m bench.links", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[100, 400], help="Mbit/s of each node's link")
    parser.add_argument("--sizes", type=float, nargs="+", default=[4, 8], help="MB that a rank's buffer holds")
    parser.add_argument("--latency", type=float, default=1.0, help="ms between two nodes, one way")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "cpu" / "links.json")
    options = parser.parse_args(arguments)
    if reason := unavailable():
        print(f"links: left out: {reason}")
        return 0
    rows = []
    print("| Mbit/s | MB | descend | climb | sync |\n|---|---|---|---|---|")
    for rate in options.rates:
        for size in options.sizes:
            share = run(rate, options.latency, size)
            rows.append({"rate_mbit": rate, "megabytes": size, "share": share})
            print(
                f"| {rate:g} | {size:g} | " + " | ".join(f"{share[n]:.3f}" for n in ("descend", "climb", "sync")) + " |"
            )
    words = ["python", "-m", "bench.links", *(sys.argv[1:] if arguments is None else arguments)]
    content = record.stamp(words, "cpu") | {
        "nodes": NODES,
        "ranks_per_node": RANKS,
        "latency_ms": options.latency,
        "rows": rows,
    }
    print(f"saved {record.save(options.out, content)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
